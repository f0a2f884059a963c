"""Alignment: learn the affinity A and the router of all layers together against the frozen dense model (eq. 1-5).

config.py          the training options
module.py          one FFN while it is being aligned: dense teacher and masked student in one
transport.py       A of all layers -> plans and assignments, once a step
soft.py            budgets and temperature of the soft router, once a step
head.py            what makes logits of a model's last hidden states
chunked.py         KL and CE of the logits, a chunk of tokens at a time
hidden.py          the error of every block's output, a fifth term
losses.py          the terms together
reconstruction.py  one layer after the other against its dense FFN, a start for the rest
schedule.py        order of the data and learning rate of a step
checkpoints.py     state on disk, so that a run continues bit for bit
stopping.py        a training that is asked to stop
ranks.py           several processes: who does what, and what they tell one another
distributed.py     their state on disk, which any number of them continues
sharding.py        frozen weights divided over them; blocks computed again
loop.py            the training loop
"""

from .config import AlignmentConfig
from .stopping import Stop, Stopped

__all__ = ["AlignmentConfig", "Stop", "Stopped"]
