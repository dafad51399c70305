"""Each node of a job is looked at before anything is loaded on it; one short step of srun.

node_check.py   what a task of the step does: one on each node, the first of them judges
node_facts.py   what one node is like
gpu_state.py    its GPUs, as nvidia-smi has them
meeting.py      the first node's clock and its verdict, over TCP
all_reduce.py   a short sum over all nodes
judge.py        what all facts together mean: which node is wrong, and what to do
"""
