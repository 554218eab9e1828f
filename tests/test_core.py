"What is picked for a machine, and what happens when memory runs out"
import pytest, torch
from dit import core as C
from dit import diffs as D
from dit.core import *
from dit.diffs import train_diffs
from dit.lora import answer, random_bank
from dit.tune import Adapter, train_adapter
from helpers import toy_tasks
from jobs import named
from test_diffs import flatten

CPU, REFUSALS = torch.device('cpu'), [torch.OutOfMemoryError('CUDA out of memory'), MemoryError(),
                                      RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]

@pytest.fixture
def rates(monkeypatch):
    "A machine with given rates and threads: (precision, threads) -> GFLOP/s"
    def given(threads, table):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
        monkeypatch.setattr(C, 'matmul_rate', lambda kind, n=None: table[kind, n or threads])
        C.probe.cache_clear()
    yield given
    C.probe.cache_clear()

F, H = torch.float32, torch.bfloat16
@pytest.mark.parametrize('threads, table, want', [
    (1, {(F, 1): 100, (H, 1): 450}, (H, 1)),
    (1, {(F, 1): 100, (H, 1): 20}, (F, 1)),
    (1, {(F, 1): 100, (H, 1): 110}, (F, 1)),
    (2, {(F, 1): 100, (H, 1): 300, (H, 2): 400}, (H, 2)),
    (2, {(F, 1): 100, (H, 1): 205, (F, 2): 136, (H, 2): 86}, (H, 1)),
    (2, {(F, 1): 330, (H, 1): 200, (F, 2): 300, (H, 2): 900}, (F, 2)),
    (8, {(F, 1): 100, (H, 1): 500, (H, 4): 700, (H, 8): 400}, (H, 4)),
    (8, {(F, 1): 100, (H, 1): 900, (H, 4): 500, (H, 8): 400}, (H, 1))])
def test_the_probe_picks_what_is_fastest_and_says_so(rates, monkeypatch, threads, table, want):
    rates(threads, table); picked = []
    monkeypatch.setattr(torch, 'set_num_threads', picked.append)
    assert best_dtype(CPU) == want[0] and picked == [want[1]]
    assert best_dtype(CPU) == want[0], 'asked twice, measured once'
    said = probe(CPU)[2]
    assert str(want[0])[6:] in said and f'{want[1]} of {threads} threads' in said

def test_the_probe_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    assert matmul_rate(F, 1, times=1) > 0 and torch.get_num_threads() == before

@pytest.mark.parametrize('refusal', REFUSALS, ids=lambda e: type(e).__name__)
def test_parts_that_do_not_fit_are_halved(refusal, capsys):
    tried = []
    def work(part):
        tried.append(len(part))
        if len(part) > 3: raise refusal
        return sum(part)
    got = list(in_parts(list(range(14)), 13, work))
    assert [x for part, _ in got for x in part] == list(range(14)) and all(sum(p) == s for p, s in got)
    assert (tried == [13, 6, 3, 3, 3, 3, 2] and capsys.readouterr().err.splitlines()
            == ['dit: out of memory, going on with 6 rows at once', 'dit: out of memory, going on with 3 rows at once'])
    with pytest.raises(DitError, match='one row alone does not fit'): list(in_parts([5], 4, lambda part: (_ for _ in ()).throw(refusal)))

def test_other_errors_are_not_taken_for_lack_of_memory():
    for e in (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), ValueError('no')):
        with pytest.raises(type(e), match=str(e)): list(in_parts([1, 2], 2, lambda part: (_ for _ in ()).throw(e)))

def narrow(base, most, refusal=REFUSALS[2]):
    "The base model's body refuses more than `most` rows at once"
    def check(module, args, kwargs):
        if kwargs['input_ids'].shape[0] > most: raise refusal
    return base.body.register_forward_pre_hook(check, with_kwargs=True)

def test_answers_are_the_same_where_few_fit(tiny, capsys):
    bank, users = random_bank(tiny, 5, seed=4), ['a', 'what is it, then?', 'hm', 'and now?', 'a', 'why']
    want = answer(tiny, bank, [4, 0, 2, 2, 1, 3], users, max_new=8)
    handle = narrow(tiny, 2)
    try: assert answer(tiny, bank, [4, 0, 2, 2, 1, 3], users, max_new=8) == want and 'going on with 1 rows' in capsys.readouterr().err
    finally: handle.remove()

def test_an_adapter_is_the_same_where_few_fit(tiny, tmp_path, capsys):
    bank, val = named(tiny, 7, 'fern', 1), named(tiny, 4, 'moss', 2)
    args = dict(rank=2, batch=4, epochs=2)
    want = train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path/'whole', **args)
    assert 'GB of memory' in capsys.readouterr().err
    handle = narrow(tiny, 2)
    try: got = train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path/'halved', **args)
    finally: handle.remove()
    assert (flatten(got).float() - flatten(want).float()).abs().max() < 1e-3 and 'going on with 2 rows' in capsys.readouterr().err
    assert (flatten(want).float() - flatten(Adapter(tiny, 2, 0).lora.bank(want.index)).float()).abs().max() > 1e-2, (
        'nothing was learnt, so the comparison says nothing')

@pytest.mark.parametrize('refusal', REFUSALS, ids=lambda e: type(e).__name__)
def test_diffs_are_the_same_where_few_fit(tiny, monkeypatch, tmp_path, capsys, refusal):
    want, normal = train_diffs(tiny, toy_tasks(3), tmp_path/'whole', rank=2, batch=4), D.train_batch
    def small(base, tasks, *a, **k):
        if len(tasks) > 1: raise refusal
        return normal(base, tasks, *a, **k)
    monkeypatch.setattr(D, 'train_batch', small)
    got = train_diffs(tiny, toy_tasks(3), tmp_path/'halved', rank=2, batch=4)
    said = capsys.readouterr().err
    assert (flatten(got) - flatten(want)).abs().max() < 1e-4 and 'going on with 1 diffs' in said and 'training diffs, at most' in said
    train_diffs(tiny, toy_tasks(3), tmp_path/'halved', rank=2, batch=4)
    assert 'GB' not in capsys.readouterr().err, 'nothing was done, so there is nothing to say'
