"""The machines a run is on: chips, memory, processes, signals, the console."""
