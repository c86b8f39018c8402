"""From a Numba function to a launch: compile, keep on disk, load, pack arguments, launch."""
