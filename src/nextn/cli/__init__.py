"""The command line: one file per command, listed by `lazy` and run by `main`; NAME_output prints for NAME."""
