"""What a config would need and take on devices one does not have: `prl plan`.

    workload      lengths of a step's rollouts -> micro-batches of every data rank, by the packer that a run uses
    layout        how the trainer's ranks share a model, and why some ways cannot work
    memory        bytes of a rank, by what they are for and by phase
    traffic       bytes of a rank to others, by axis of the layout
    timing        seconds of a step from FLOPs, bytes and a table of devices; which of them is the bottleneck
    serving       the engines: weights, room for tokens, seconds to sample a step's tokens, bytes of an update
    study         all of it for one layout or many;  describe: as text and JSON

Arithmetic over what `prl.train.survey` read off the model. Imports no torch.
"""
