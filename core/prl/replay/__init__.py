"""A run is done again from its event log, and compared with its ledger: `prl replay`.

history     which launches led to the weights, and up to which step each counts (ledger + heads of the logs)
launch      one launch after the other, in `<run>/replay`, by the run's own launcher: the trainer, and in the
            controller's place the worker
worker      that process: the hub, the trainer's ranks, and
reenact     the controller's decisions, one event at a time, by the objects that a run is controlled with
compare     what the ledger says of a launch, and what differs first
"""
