"""First floor: where a step's time and memory go: traces, memory snapshots, collectives at a hang, times by part."""
