"""What people see: lines and tables on a terminal, live progress. The only package that writes to a stream."""
