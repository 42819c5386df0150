"""A piece of work on two ranks of this machine."""

import gc

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(work, folder):
    """Call work(rank, folder), a function of a module, in two processes that form a group."""
    mp.spawn(_rank, (work, folder), nprocs=2)


def _rank(rank, work, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    work(rank, folder)
    # Gloo aborts a process whose peer closes the connection that an object still uses.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
