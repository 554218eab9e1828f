"The long ones, by `make soak`: memory stays flat over 2,000 diffs, and a bank of 100,000 rows opens at once"
import json, time
from pathlib import Path

import pandas as pd, torch
from dit.data import news_task
from dit.core import sha256_of, write_csv
from dit.diffs import train_diffs
from dit.eval import ask_all
from dit.lora import load_bank, open_bank, random_bank, read_index, tiny_base
from dit.tune import train_adapter
from dit.writers import base_answers, load_texts
from safetensors.torch import save_file
from helpers import COUNTS
import jobs

def rss(): return next(int(l.split()[1])/1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmRSS')) # MB

def test_memory_is_flat_over_2000_diffs(tmp_path, n=2000):
    "Ten parts; after the first, memory may grow by a tenth of itself and 50 MB"
    torch.set_num_threads(1)
    base, sizes = tiny_base(), []
    said = base_answers(base, max_new=4)
    for part in range(10):
        rows = jobs.rows(n//10).assign(label=lambda x: [f'label {part} {i}' for i in range(len(x))])
        texts = load_texts(jobs.Scribe(tmp_path/'log'), rows, 'news', tmp_path/'text.jsonl')
        bank = train_diffs(base, [news_task(l, 'train', texts[l], said, steps=2) for l in rows.label], tmp_path/'bank', batch=50)
        half = n//20
        adapter = train_adapter(base, {'What?': bank.take(list(range(half)))}, {'What?': bank.take(list(range(half, 2*half)))},
                                tmp_path/f'adapter {part}', rank=2, batch=50, epochs=2)
        asked = ask_all(base, bank, adapter, 'news', 'DIT', max_new=4)
        assert len(bank) == len(asked) == n//10
        sizes.append(rss())
    print('\nMB after each tenth:', [round(s) for s in sizes])
    assert len(read_index(tmp_path/'bank')) == n and max(sizes[1:]) < 1.1*sizes[0] + 50

def test_a_bank_of_100000_rows(tmp_path, n=100_000, shard=250):
    "A shard's first row pays for the checksum of all of it, so the slowest row is timed, too; nothing else should be going on"
    base = tiny_base()
    open_bank(tmp_path, base, rank=1, scaling=1.)
    parts = []
    for s in range(n//shard):
        bank, name = random_bank(base, shard, seed=s), f'shard-{s:05d}.safetensors'
        save_file({f'{k}.{x}': t[k] for x, t in (('A', bank.A), ('B', bank.B)) for k in t}, tmp_path/name)
        parts.append(bank.index.assign(diff_id=[f'{s}/{i}' for i in range(shard)], shard=name, position=range(shard),
                                       sha256=sha256_of(tmp_path/name)[:16]))
    write_csv(tmp_path/'index.csv', pd.concat(parts, ignore_index=True))
    def timed(work): t = time.perf_counter(); out = work(); return out, time.perf_counter() - t
    index, indexed = timed(lambda: read_index(tmp_path))
    bank, opened = timed(lambda: load_bank(tmp_path, base))
    rows = torch.randint(n, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    each = sorted(timed(lambda: bank.rows([i]))[1] for i in rows)
    print(f'\n{n} rows: index {indexed:.2f} s, open {opened:.2f} s, a row {1e3*each[0]:.2f} ms (fastest), '
          f'{1e3*each[len(each)//2]:.2f} ms (median), {1e3*each[-1]:.2f} ms (slowest); {rss():.0f} MB')
    assert len(bank) == len(index) == n
    assert opened < 2 and each[-1] < .005
    COUNTS['rows checked'] += len(rows)
