"""Swap files: where records lie (layout), the files themselves (swap_file), moving bytes (io_queue), what a folder can
do (probe). Only futures leave this package; asyncio and aiofiles are named nowhere else."""
