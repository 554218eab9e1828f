"Functions that tests run in processes of their own"
import resource

import torch

from dit.core import write_json
from dit.diffs import train_diffs
from dit.lora import load_bank, random_bank, save_shard
from dit.tune import train_adapter
from helpers import model_of, toy_tasks

def diffs(folder, n=10, steps=12, batch=2):
    torch.set_num_threads(1)
    train_diffs(model_of('llama'), toy_tasks(n, steps), folder, rank=2, batch=batch)

def named(base, n, name, seed):
    bank = random_bank(base, n, seed=seed)
    bank.index['label'] = [f'{name} {i}' for i in range(n)]
    return bank

def adapter(folder, epochs=5, **kwargs):
    torch.set_num_threads(1)
    base = model_of('llama')
    train_adapter(base, {'What?': named(base, 12, 'fern', 1)}, {'What?': named(base, 4, 'moss', 2)}, folder, rank=2, batch=4, epochs=epochs, **kwargs)

def shard(folder): save_shard(folder, random_bank(model_of('llama'), 4, seed=3))

def read_rows(folder, out):
    "Read a bank four rows at a time; how much the process's memory grew"
    torch.set_num_threads(1)
    bank, peak = load_bank(folder, model_of('llama', hidden_size=64, intermediate_size=128)), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    bank.rows([0, 1, 2, 3]); before = peak()
    for i in range(0, len(bank), 4): bank.rows(range(i, i + 4))
    write_json(out, peak() - before)

def big_json(path): write_json(path, ['x'*100]*1000)

def lines(path):
    from dit.endpoint import Lines
    a = Lines(path)
    for i in range(1000): a[f'k{i}'] = 'y'*80
