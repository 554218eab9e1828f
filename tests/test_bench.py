"The bench: all columns train the same diffs, a wrong one gets no number, and what is counted is counted right"
import json, math

import pytest, torch
from dit import bench as B
from dit.bench import *
from dit.diffs import RECIPES, tokenise
from dit.lora import random_bank
from helpers import copy_of, model_of

CPU = torch.device('cpu')
quiet = lambda units: None

def lines(frame): return {(r.column, r.precision): r for r in frame.itertuples()}
def numbers(frame): return frame.drop(columns=['column', 'what', 'precision', 'note'], errors='ignore')

# --- the columns --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, column', [*(('llama', c) for c in 'bcde'), ('qwen3', 'c'), ('qwen3', 'd')])
def test_columns_train_the_same_diffs_each_on_its_own(kind, column):
    assert gate(WAYS[column][1], model_of(kind), rank=2) == ''

def test_the_trainer_trains_the_same_diffs(tiny):
    tasks = bench_tasks(2, 3, short=True)
    got, want = (f(tiny, tasks, 2, 1e-2, quiet) for f in (by_trainer, peft_loop))
    assert differs(got, want) == ''

def test_layers_compiled_train_the_same_diffs(tiny, monkeypatch):
    "Without generating code: what is traced is what is tested"
    normal = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: normal(f, backend='eager', **kwargs))
    assert gate(WAYS['f'][1], tiny) == ''

def test_columns_leave_the_base_model_alone(tiny):
    before = {k: v.clone() for k, v in copy_of(tiny).state_dict().items()}
    for c in 'abcde': WAYS[c][1](tiny, bench_tasks(2, 2, short=True), 1, 1e-2, quiet)
    after = tiny.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert (not any(p.requires_grad for p in tiny.model.parameters())
            and tiny.model.config._attn_implementation == model_of('llama').model.config._attn_implementation)

@pytest.mark.parametrize('column', 'abcde')
def test_every_column_counts_the_same_tokens(tiny, column):
    tasks, told = bench_tasks(2, 2, short=True), []
    WAYS[column][1](tiny, tasks, 1, 1e-2, told.append)
    assert sum(told) == sum(len(ids) for t in tasks for step in tokenise(tiny, t) for _, _, (ids, _) in step), (
        'own tokens: not padded, not merged')
    assert len(told) == (4 if column in ONE_BY_ONE else 2)

def test_samples_have_the_shape_of_the_recipe():
    task, = bench_tasks(1, 4)
    assert [s.kind for s in task.steps[0]] == [k for k, n in zip(('right', 'wrong', 'none'), RECIPES['hidden_topic']['mix'])
                                               for _ in range(n)]

def test_the_number_of_matrix_products_does_not_grow_with_the_diffs(tiny):
    one, more = ({products(tiny, n, rank) for n in (2, 5, 8)} for rank in (1, 4))
    assert len(one) == len(more) == len({products(tiny, 5, rank) for rank in (2, 4)}) == 1 and max(one) < max(more), (
        'rank 1 needs none of its own')

def test_the_adapters_matrix_products_do_not_grow_with_the_rows(tiny):
    adapter, bank, counts = B.Adapter(tiny, 2, 0), random_bank(tiny, 8, 2), set()
    data = B.examples(tiny, bank, 'What?')
    for n in (2, 5, 8):
        with B.Products() as count: adapter(bank.rows(range(n)), [e for _, e in data[:n]]).backward()
        counts.add(count.count)
    assert len(counts) == 1

def test_more_diffs_than_fit_into_a_pass_come_batch_by_batch(tiny, monkeypatch):
    seen, normal = [], B.train_batch
    monkeypatch.setattr(B, 'train_batch', lambda base, tasks, *args, **kwargs: seen.append([t.diff_id for t in tasks])
                        or normal(base, tasks, *args, **kwargs))
    frame = growth_table(tiny, [2, 7], 3, 2, 1)
    assert [len(x) for x in seen] == [2, 3, 3, 1]*2 and len(set(sum(seen[1:4], []))) == 7
    assert frame['s per diff'].notna().all() and frame['matrix products'].nunique() == 1

# --- gates --------------------------------------------------------------------------------------------------------------------

def test_what_differs_is_found():
    want = (torch.ones(2, 4), torch.ones(2))
    assert differs((want[0]*1.0005, want[1]), want) == '' and differs((want[0][:1], want[1][:1]), want) == ''
    assert 'weights differ by 2e-03' in differs((want[0]*1.002, want[1]), want)
    assert 'losses differ by 1e-03' in differs((want[0], want[1] + 1e-3), want)
    assert 'weights' in differs((want[0]*math.nan, want[1]), want) and 'losses' in differs((want[0], want[1]*math.nan), want)

def test_diffs_that_feel_each_other_are_found(tiny):
    "Too little to be seen in the weights, which stay within a thousandth; exchanging a diff shows it"
    def mixed(base, tasks, rank, lr, tell):
        p, losses = our_diffs(base, tasks, rank, lr, tell)
        return p + 1e-3*p.mean(0), losses
    assert 'when another is exchanged' in gate(mixed, tiny)
    tasks = bench_tasks(3, 3, short=True)
    assert differs(*(f(tiny, tasks, 1, 1e-2, quiet) for f in (mixed, peft_loop))) == ''

@pytest.fixture
def wrong(monkeypatch):
    "Column d trains something else, column c fails"
    def other(base, tasks, rank, lr, tell):
        return our_diffs(base, tasks, rank, 2*lr, tell)
    def broken(*args): raise RuntimeError('no such kernel\nand more')
    monkeypatch.setitem(B.WAYS, 'd', ('wrong', other)); monkeypatch.setitem(B.WAYS, 'c', ('broken', broken))

def test_a_column_whose_gate_fails_gets_no_number(tiny, wrong, tmp_path):
    bases = dict(float32=tiny, bfloat16=model_of('llama')); bases['bfloat16'].model.to(torch.bfloat16)
    gates = small_gates('bcde')
    assert gates['b'] == gates['e'] == '' and 'losses differ' in gates['d'] and gates['c'] == 'failed: RuntimeError: no such kernel'
    rate = dict(float32=1., bfloat16=1.)
    for known in (gates, dict.fromkeys('bcde', '')): # refused by the small model, and by the timed runs themselves
        frame = diff_table(bases, 'bcde', bench_tasks(3, 3, short=True), 2, 1, 1, known, rate)
        got = lines(frame)
        for p in bases:
            assert numbers(frame)[(frame.column == 'd') | (frame.column == 'c')].isna().all(axis=None)
            assert got['d', p].note.startswith('not shown: its losses') and got['c', p].note == 'failed: RuntimeError: no such kernel'
            assert got['e', p].note == got['b', p].note == ''
        assert numbers(frame)[frame.column.isin(['b', 'e'])].notna().all(axis=None)
    save_tables(dict(some=frame), tmp_path/'x', {})
    kept = json.loads((tmp_path/'x.json').read_text())['tables']['some']
    assert all(set(k for k, v in r.items() if v is not None) == {'column', 'what', 'precision', 'note'}
               for r in kept if r['column'] in 'cd')

def test_columns_that_pad_may_train_fewer_diffs(tiny):
    known = dict(b='', c='', e='')
    frame = diff_table(dict(float32=tiny), 'bce', bench_tasks(3, 2, short=True), 1, 1, 1, known, dict(float32=1.), padded=2)
    assert [t.split(',')[0] for t in frame['timed on']] == ['diffs: 1', 'diffs: 2', 'diffs: 3'] and not frame.note.any()

def test_without_the_reference_nothing_is_shown(tiny, wrong, monkeypatch):
    monkeypatch.setitem(B.WAYS, 'b', B.WAYS['c'])
    frame = diff_table(dict(float32=tiny), 'be', bench_tasks(2, 2, short=True), 1, 1, 1, dict(b='', e=''), dict(float32=1.))
    assert 's per diff' not in frame and frame.note.str.contains('failed: RuntimeError').all()

def test_bfloat16_follows_its_float32_and_stays_within_a_hundredth():
    run = lambda w, l: [dict(out=(torch.full((1, 4), w), torch.tensor([l])), error='')]
    runs = {('b', 'float32'): run(1., 2.05), ('b', 'bfloat16'): run(1.1, 2.), ('e', 'float32'): run(1., 2.05),
            ('e', 'bfloat16'): run(1.2, 2.01)}
    ask = lambda **more: verdict(runs | {tuple(k.split('_')): v for k, v in more.items()}, ('e', 'bfloat16'), dict(e=''))
    assert (ask() == '' and 'off' in ask(e_bfloat16=run(1., 2.03)) and 'weights' in ask(e_float32=run(1.2, 2.05))
            and 'off' in ask(e_bfloat16=run(1., math.nan)))

def test_compiling_that_does_not_pay_is_said():
    rows = [{'column': c, 'precision': 'float32', 's per diff': s, 'note': ''} for c, s in (('e', 1.), ('f', 2.))]
    assert [r['note'] for r in slower(rows)] == ['', 'slower than (e)'] and slower(rows[::-1][:1])[0]['note'] == ''

# --- adapter and asking -------------------------------------------------------------------------------------------------------

def test_adapters_are_the_same(tiny, monkeypatch):
    monkeypatch.setattr(B, 'compile_layers', lambda base: None) # that compiled layers compute the same is tested above
    frame = adapter_table(dict(float32=tiny), 2, 3, 4, 3, 1, compiled=True)
    assert frame.note.tolist() == ['']*4 and frame['s per diff'].notna().all()
    assert [t.split()[-1] for t in frame['timed on']] == ['3', '3', '4', '4'], 'each at its own batch'
    normal = B.our_adapter
    monkeypatch.setattr(B, 'our_adapter', lambda base, bank, parts, tell: normal(base, random_bank(base, len(bank), 2, .3), parts, tell))
    frame = adapter_table(dict(float32=tiny), 2, 3, 4, 3, 1, compiled=True)
    assert frame['s per diff'].isna().tolist() == [False, True, True, True] and 'differ' in frame.note[1]

def test_answers_are_the_same(tiny, monkeypatch):
    frame = asking_table(dict(float32=tiny), 2, 4, 2, 6, 1)
    assert frame.note.tolist() == ['']*3
    normal = B.answer
    monkeypatch.setattr(B, 'answer', lambda base, bank, rows, *args, **kwargs: normal(base, bank, rows[::-1], *args, **kwargs))
    assert asking_table(dict(float32=tiny), 2, 4, 2, 6, 1).note.tolist() == ['', '', 'not shown: its answers differ']

# --- goals --------------------------------------------------------------------------------------------------------------------

def timed(*lines):
    return B.pd.DataFrame([{'column': c, 'precision': p, 's per diff': s, 'from': .5*s if s else None,
                            'to': 2*s if s else None, 'tokens/s': 4e5, 'of matmul': .32} for c, p, s in lines])

def test_goals_are_looked_up_in_the_tables_of_their_device(tmp_path):
    diffs = timed(('a', 'float32', 60.), ('b', 'float32', 20.), ('e', 'float32', 10.), ('b', 'bfloat16', 8.), ('e', 'bfloat16', 5.))
    save_tables({'training diffs': diffs,
                 'one diff more': timed(('8 diffs', 'float32', 1.), ('32 diffs', 'float32', .7), ('128 diffs', 'float32', .5))},
                tmp_path/'m-cpu', {})
    save_tables({'training diffs': diffs}, tmp_path/'m-cuda', {})
    got = speed_table(tmp_path, 'm')
    cpu, cuda = (got[got.device == d].set_index('what') for d in ('cpu', 'cuda'))
    assert cpu.measured.iloc[0] == '12 (3 to 48)' and cpu.reached.iloc[0] == 'aim', (
        'ours in the best precision, against the Trainer in its own')
    assert cpu.measured.iloc[1] == '1.6 (0.4 to 6.4)' and cpu.reached.iloc[1] == 'no'
    assert cpu.measured['most diffs together, against fewest'].startswith('2 ') and (cpu.measured == 'not yet measured').sum() == 4
    assert (cuda.measured['thousands of tokens a second'].startswith('400 ') and cuda.measured.iloc[3].startswith('32 ')
            and list(cuda.reached) == ['no', '', 'no', 'must', ''])

def test_what_got_no_number_reaches_no_goal(tmp_path):
    both = timed(('a', 'float32', 60.), ('e', 'bfloat16', 10.), ('f', 'bfloat16', 5.))
    assert (B.reached({'training diffs': both}, next(GOALS.itertuples()))[0] == 12.
            and B.reached({'training diffs': both[:2]}, next(GOALS.itertuples()))[0] == 6.), (
                'the faster of plain and compiled layers')
    refused = timed(('a', 'float32', 60.), ('e', 'float32', 10.), ('e', 'bfloat16', None))
    assert B.reached({'training diffs': refused}, next(GOALS.itertuples()))[0] == 6., 'bfloat16 was refused, so float32 counts'
    assert (B.reached({'training diffs': refused[1:]}, next(GOALS.itertuples())) == []
            == B.reached({'training diffs': refused.drop(columns='s per diff')}, next(GOALS.itertuples())))
    assert (speed_table(tmp_path, 'nothing here').measured == 'not yet measured').all()

# --- the clock ----------------------------------------------------------------------------------------------------------------

def test_columns_run_in_turn_and_a_failed_one_once():
    seen = []
    def fails(tell): seen.append('b'); raise ValueError
    runs = interleave(dict(a=lambda tell: seen.append('a'), b=fails, c=lambda tell: seen.append('c')), 2, CPU)
    assert ''.join(seen) == 'abcacac' and runs['b'][0]['error'] == 'failed: ValueError: '

def test_warm_up_is_apart_and_in_the_totals():
    runs = [dict(seconds=s, marks=[], out=None, error='', peak_gb=math.nan) for s in (10., 2., 4., 3.)]
    r = row('e', 'float32', runs, lambda r: r['seconds']/2, 'all of it')
    assert ((r['s per diff'], r['from'], r['to'], r['warm-up s']) == (1.5, 1., 2., 7.)
            and r['1,000 diffs, hours'] == pytest.approx((7 + 1500)/3600))

def test_a_tables_speeds_are_those_of_the_same_precision():
    rows = [{'column': c, 'precision': p, 'timed on': '', 's per diff': s, 'note': ''}
            for c, p, s in (('b', 'float32', 8.), ('b', 'bfloat16', 4.), ('e', 'float32', 2.), ('e', 'bfloat16', .5))]
    assert table(rows, 'b')['times b'].tolist() == [1, 1, 4, 8]
