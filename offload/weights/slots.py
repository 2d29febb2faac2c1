"""Slots: the device memory that one partition's weights occupy while fetched, and what parameters point to.

Owns: the memory of every partition's flat parameters, its views, the placeholders of parameters that are not on the
device.
Does not: copy (fetch.py) or decide (schedule.py).
Threads: `show`, `hide` and `leave` on the training thread; the memory is resized and filled by the h2d queue.

Note [Release]: a parameter that nothing uses has the placeholder class. Its data stay in the slot as long as the slot
holds its weights: `show` and `hide` change the class alone, and the data only where the slot has come or gone.
Autograd saves views of a weight, not the parameter, so the memory is freed by resizing the flat's storage, which every
view shares. A parameter of full shape without storage would crash whoever reads it: without a slot it is a NaN scalar
of its own, expanded. Shapes stay true, reads give NaN, and a write through `fill_` changes that scalar, which
`check_placeholders` sees. Writes to a slot, in a use or outside, are seen by torch's own counter of changes in place,
which every parameter keeps while its data come and go.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.device.protocol import Device
from offload.errors import ParameterWritten
from offload.memory.region import bits
from offload.model.partitions import Entry, Partition
from offload.model.placeholders import PlaceholderTypes
from offload.ranks.protocol import Ranks
from offload.storage.homes import Chunk


class Slot:
    """The device side of one partition's weights: both flat parameters, the trainable one first."""

    __slots__ = (
        "_classes",
        "_entries",
        "_is_pointed",
        "_placeholders",
        "_places",
        "_ranges",
        "_scalar_bits",
        "_scalars",
        "_untouched",
        "_versions",
        "_views",
        "bytes",
        "flat",
        "partition",
        "shards",
    )

    def __init__(
        self,
        partition: Partition,
        chunks: Sequence[Chunk],
        dtype: torch.dtype,
        device: Device,
        *,
        ranks: Ranks,
        types: PlaceholderTypes,
    ) -> None:
        self.partition = partition
        numel = partition.trainable.numel + partition.frozen.numel
        self._entries: list[Entry] = list(partition.entries())
        self.flat = torch.empty(numel, dtype=dtype, device=device.torch_device)
        self._views = [
            self.flat[start : start + entry.numel].view(entry.shape)
            for entry, start in zip(self._entries, self._starts(), strict=True)
        ]
        # `.data` has a version counter of its own: filling it is no in-place change in autograd's eyes.
        self.bytes: Tensor = self.flat.data.view(torch.uint8)
        # All views are made while there is storage: torch checks their bounds when they are made, not when used.
        self._ranges = {(p.trainable, p.start, p.stop): self._range(p.trainable, p.start, p.stop) for p in chunks}
        self.shards = [
            (self._range(trainable, 0, flat.numel), self._range(trainable, *flat.shard(ranks.rank, ranks.world_size)))
            for trainable, flat in ((True, partition.trainable), (False, partition.frozen))
            if flat.numel
        ]
        """(whole, one rank's shard) of each flat parameter, as bytes."""
        self.flat.untyped_storage().resize_(0)
        self._scalars = torch.full((len(self._entries),), math.nan, dtype=dtype, device=device.torch_device)
        # Compared as bytes: a torch call lets other threads in, and the training thread would wait for its turn.
        self._scalar_bits = bits(self._scalars) if device.is_host else None
        self._untouched = b"" if self._scalar_bits is None else self._scalar_bits.tobytes()
        self._placeholders = [self._scalars[i].expand(e.shape) for i, e in enumerate(self._entries)]
        self._places = [placeholder.data_ptr() for placeholder in self._placeholders]
        self._is_pointed = False
        """The data of the parameters are in the slot."""
        self._versions: list[int] = []
        self._classes = [
            (entry.parameter, entry.original_class, types.of(entry.original_class)) for entry in self._entries
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes while fetched."""
        return self.bytes.numel()

    def range(self, trainable: bool, start: int, stop: int) -> Tensor:
        """The bytes of one chunk."""
        return self._ranges[trainable, start, stop]

    def _range(self, trainable: bool, start: int, stop: int) -> Tensor:
        first = (0 if trainable else self.partition.trainable.numel) + start
        itemsize = self.flat.element_size()
        return self.bytes[first * itemsize : (first + stop - start) * itemsize]

    def show(self) -> None:
        """Parameters have their own class, and their data in the slot."""
        for parameter, original, _ in self._classes:
            parameter.__class__ = original
        if not self._is_pointed:
            for entry, view in zip(self._entries, self._views, strict=True):
                entry.parameter.data = view
            self._is_pointed = True
        self._versions = [parameter._version for parameter, _, _ in self._classes]

    def hide(self) -> None:
        """Parameters have the placeholder class; their data stay where they are."""
        for parameter, _, hidden in self._classes:
            parameter.__class__ = hidden

    def leave(self) -> None:
        """The slot is about to lose its memory: the data of the parameters are placeholders."""
        self._is_pointed = False
        for (parameter, original, hidden), placeholder in zip(self._classes, self._placeholders, strict=True):
            parameter.__class__ = original
            parameter.data = placeholder
            parameter.__class__ = hidden

    def check_placeholders(self) -> None:
        """Raise ParameterWritten where user code wrote to a released parameter.

        What is in a scalar is looked at on the host only: on an accelerator the training thread would wait for it.
        """
        if self._is_pointed:
            self._check_versions("written to while nothing of the model used it")
            return
        with torch._C.DisableTorchFunctionSubclass():
            places = [entry.parameter.data_ptr() for entry in self._entries]
        if places != self._places:
            found = zip(self._entries, places, self._places, strict=True)
            written = next(entry for entry, place, expected in found if place != expected)
            self.leave()
            raise _written(written.name, "given other data while its weights were not on the device")
        if self._scalar_bits is None or self._scalar_bits.tobytes() == self._untouched:
            return
        untouched = self._scalars.isnan()
        self._scalars.fill_(math.nan)
        if untouched.all():
            return
        names = [entry.name for entry, nan in zip(self._entries, untouched.tolist(), strict=True) if not nan]
        raise _written(names[0], "written to while its weights were not on the device")

    def check_weights(self) -> None:
        """Raise ParameterWritten where a parameter was changed in place since it was shown last."""
        self._check_versions("changed in place in a forward, as by max_norm of an embedding")

    def _check_versions(self, what: str) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            versions = [parameter._version for parameter, _, _ in self._classes]
        if versions != self._versions:
            found = zip(self._entries, versions, self._versions, strict=True)
            written = next(entry for entry, version, expected in found if version != expected)
            self._versions = versions  # told once
            raise _written(written.name, what)

    def restore_class(self) -> None:
        """Parameters have their own class again: the session hands them back."""
        for parameter, original, _ in self._classes:
            parameter.__class__ = original

    def _starts(self) -> list[int]:
        return [e.start for e in self.partition.trainable.entries] + [
            self.partition.trainable.numel + e.start for e in self.partition.frozen.entries
        ]


def _written(name: str, how: str) -> ParameterWritten:
    return ParameterWritten(
        f"parameter {name!r} was {how}; the write would be lost. Write inside `with session.gathered(module):`, or "
        "before `offload.enable`."
    )
