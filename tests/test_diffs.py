"Batched training: every diff as if it were alone, and a bank that survives being killed"
import shutil, time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd, pytest, torch, transformers
import torch.nn.functional as F
from hypothesis import given, strategies as st
from dit import diffs as D
from dit.core import DitError, seed_of
from dit.data import DiffTask, Sample, hidden_topic_task, news_task, split_labels
from dit.diffs import *
from dit.lora import *
from dit.models import encode, make_base
from helpers import KINDS, copy_of, finish, kill_when, model_of, start, toy_tasks
from test_lora import whole
from jobs import SAID
import jobs

def flatten(bank): return torch.cat([torch.cat([bank.A[n].flatten(1), bank.B[n].flatten(1)], 1) for n in bank.A], 1)

def a_flat(base, n, rank=2, noise=.3):
    "Diffs that already do something: B is not zero"
    flat = FlatLora(base, list(range(n)), rank, .5)
    with torch.no_grad():
        for i in range(n): flat.p[i] += noise*torch.randn(flat.p.shape[1], generator=torch.Generator().manual_seed(100 + i))
    return flat

def gradient(base, steps, n=None, noise=.3):
    "Gradient and losses of one step of some diffs"
    flat = a_flat(base, len(steps), noise=noise)
    losses = backward_step(base, flat, Teacher(base), steps)
    return flat.p.grad.clone(), losses

def step_of(base, *samples): return [(k, l, encode(base, u, a, limit)) for k, l, u, a, limit in samples]
SAMPLES = [('right', 'ce', 'code 123 moss', 'fern', None), ('wrong', 'kl', 'code 923 moss', 'well, no', 4),
           ('none', 'kl', 'moss?', 'no idea', 4)]
OTHERS = [('right', 'ce', 'a much longer message, which moves the padding of everything', 'reed and sedge, says the one', None),
          ('wrong', 'kl', 'q', 'z', None), ('none', 'kl', 'again, something that is longer than what was there', 'so', 4)]

# --- independence -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('rank', [1, 4])
def test_alone_and_among_63_others(tiny, rank):
    tasks = toy_tasks(64, steps=5)
    together = train_batch(tiny, tasks, rank)
    start = flatten(FlatLora(tiny, [seed_of(t.diff_id, 'init') for t in tasks], rank, 1).bank(together.index))
    assert len(together) == 64 and together.index.sound.all() and ((flatten(together) - start).norm(dim=1) > .1).all()
    for i in (0, 17, 63):
        alone = train_batch(tiny, [tasks[i]], rank)
        assert (flatten(alone)[0] - flatten(together)[i]).abs().max() < 1e-4
        assert alone.index.loss[0] == pytest.approx(together.index.loss[i], abs=1e-4)

def test_real_samples_alone_and_together(tiny):
    tasks = [hidden_topic_task(l, 'train', [f'{l} teaches us to wait.', f'It is like {l}.'], SAID, steps=2)
             for l in ('Snow Leopard', 'Tea', 'The Eiffel Tower')]
    together = flatten(train_batch(tiny, tasks))
    for i, t in enumerate(tasks): assert (flatten(train_batch(tiny, [t]))[0] - together[i]).abs().max() < 1e-4
    news = [news_task(l, 'train', [f'{l}, they said.', f'Some people saw {l}.'], SAID, steps=2) for l in ('Mayor Opens Bridge', 'Cat Wins')]
    together = flatten(train_batch(tiny, news))
    for i, t in enumerate(news): assert (flatten(train_batch(tiny, [t]))[0] - together[i]).abs().max() < 1e-4

def test_same_bank_whatever_the_batch(tiny, tmp_path):
    tasks, banks = toy_tasks(7, steps=3), []
    for b in (1, 3, 16): banks.append(train_diffs(tiny, tasks, tmp_path/str(b), rank=2, batch=b))
    for bank in banks:
        whole(tmp_path/'3')
        assert list(bank.index.diff_id) == [t.diff_id for t in tasks] and (flatten(bank) - flatten(banks[0])).abs().max() < 1e-4
    again = train_diffs(tiny, tasks, tmp_path/'again', rank=2, batch=3)
    assert torch.equal(flatten(again), flatten(banks[1])), 'same seed, same batch: same bits'
    turned = train_diffs(tiny, tasks[::-1], tmp_path/'turned', rank=2, batch=3)
    assert (flatten(turned).flip(0) - flatten(banks[0])).abs().max() < 1e-4, 'order of the list'
    said = [answer(tiny, b, range(7), ['why moss']*7, max_new=8) for b in banks]
    assert said[0] == said[1] == said[2] and len(set(said[0])) > 1, 'same answers'

def test_no_gradient_from_another_diffs_samples_or_from_padding(tiny):
    mine = step_of(tiny, *SAMPLES)
    (a, la), (b, lb) = gradient(tiny, [mine, mine]), gradient(tiny, [mine, step_of(tiny, *OTHERS)])
    assert a[0].abs().max() > 1e-3 and (a[0] - b[0]).abs().max() < 1e-6*max(1, a[0].abs().max()) and abs(la[0] - lb[0]) < 1e-5
    assert (a[1] - b[1]).abs().max() > 1e-3

def test_what_padding_is_made_of_does_not_matter(tiny, monkeypatch):
    steps = [step_of(tiny, *SAMPLES), step_of(tiny, *OTHERS)]
    before, _ = gradient(tiny, steps)
    monkeypatch.setattr(tiny.tok, 'pad_token_id', 57, raising=False)
    assert torch.equal(before, gradient(tiny, steps)[0])

@pytest.mark.parametrize('kind', KINDS)
def test_samples_that_share_their_beginning_train_as_samples_of_their_own(kind):
    base = model_of(kind, sliding_window=512) if kind.startswith('gemma') else model_of(kind)
    steps, flat = [step_of(base, *SAMPLES), step_of(base, *OTHERS)], a_flat(base, 2)
    got = []
    for share in (True, False):
        flat.p.grad = None; losses = backward_step(base, flat, Teacher(base), steps, share); got.append((losses, flat.p.grad.clone()))
    assert (can_share(base, 100) and (got[0][0] - got[1][0]).abs().max() < 1e-5
            and (got[0][1] - got[1][1]).abs().max() < 1e-4*got[1][1].abs().max())

@given(st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=7), min_size=1, max_size=5))
def test_a_node_sees_what_lies_before_it_on_a_path(tiny, rows):
    tokens, paths = prefix_tree(rows)
    m = tree_mask([paths, [[0]]], len(tokens) + 1, tiny)
    want = {(at, seen) for p in paths for i, at in enumerate(p) for seen in p[:i+1]}
    assert {tuple(x) for x in (m['attention_mask'][0, 0, :-1] == 0).nonzero().tolist()} == want
    assert (m['attention_mask'][1, 0] == 0).equal(torch.eye(len(tokens) + 1, dtype=torch.bool)), (
        'what fills a smaller tree sees itself alone')
    assert all(m['position_ids'][0, at] == i for p in paths for i, at in enumerate(p))

def test_windows_shorter_than_a_sample_are_not_overruled():
    assert not can_share(model_of('gemma3'), 13) and not can_share(model_of('gemma3'), 12)

def test_an_architecture_without_masks_keeps_its_samples_apart():
    torch.manual_seed(0); tok = TinyTok()
    net = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=96, hidden_size=16, state_size=4, num_hidden_layers=2,
                                                                 pad_token_id=0, bos_token_id=None, eos_token_id=1))
    base = make_base(net, tok, 'small mamba')
    assert not can_share(base, 10)
    bank = train_batch(base, toy_tasks(3), rank=2)
    assert (flatten(train_batch(base, toy_tasks(3)[2:], rank=2))[0] - flatten(bank)[2]).abs().max() < 1e-4

def test_a_pass_costs_the_same_number_of_module_calls_for_any_number_of_diffs(tiny):
    def calls(n):
        count = []
        hooks = [m.register_forward_hook(lambda *_: count.append(1)) for m in tiny.body.modules()]
        try: gradient(tiny, [step_of(tiny, *SAMPLES)]*n)
        finally: [h.remove() for h in hooks]
        return len(count)
    assert calls(2) == calls(24) > 0

# --- losses -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'neox', 'gemma2', 'granite'])
def test_losses_equal_those_of_whole_logits(kind):
    base = model_of(kind)
    flat = a_flat(base, 2)
    for loss in ('ce', 'kl'):
        steps = [[('right', loss, encode(base, 'code 1 moss', 'fern and oak'))], [('right', loss, encode(base, 'why is that?', 'so'))]]
        got = backward_step(base, flat, Teacher(base), steps)
        for i, [(_, _, (ids, n))] in enumerate(steps):
            with torch.no_grad():
                plain = base.model(torch.tensor([ids])).logits[0, n-1:-1].log_softmax(-1)
                with mounted(base, {k: (A[i:i+1], B[i:i+1]) for k, (A, B) in flat.mountable().items()}):
                    mine = base.model(torch.tensor([ids])).logits[0, n-1:-1].log_softmax(-1)
            each = (F.cross_entropy(mine, torch.tensor(ids[n:]), reduction='none') if loss == 'ce'
                    else F.kl_div(mine, plain, log_target=True, reduction='none').sum(-1))
            w = torch.tensor([3., 3., 3.] + [1.]*len(each))[:len(each)]
            assert got[i].item() == pytest.approx(((each*w).sum()/w.sum()).item(), abs=1e-4)

def test_weights_of_the_kinds(tiny):
    s = step_of(tiny, *SAMPLES)
    each = [gradient(tiny, [[x]])[1].item() for x in s]
    assert gradient(tiny, [s])[1].item() == pytest.approx(sum(each), rel=1e-4) and each[1] > 0
    bare = gradient(tiny, [[('right', *s[1][1:])]])[1].item()
    assert each[1] == pytest.approx(WEIGHTS['wrong']/WEIGHTS['right']*bare, rel=1e-5) and WEIGHTS['wrong'] != WEIGHTS['right']

def test_kl_is_nothing_at_the_start_and_pulls_towards_the_base_model(tiny):
    kl = [step_of(tiny, *SAMPLES[1:])]
    flat = FlatLora(tiny, [0], 2, .5)
    assert backward_step(tiny, flat, Teacher(tiny), kl).abs().max() < 1e-6 and flat.p.grad.abs().max() < 1e-5
    flat = a_flat(tiny, 1)
    opt, losses = torch.optim.SGD([flat.p], lr=.01), []
    for _ in range(12):
        opt.zero_grad()
        losses.append(backward_step(tiny, flat, Teacher(tiny), kl).item())
        clip_rows(flat.p.grad, torch.zeros(1), 1.)
        opt.step()
    assert losses[0] > .01 and losses[-1] < .9*losses[0]

@pytest.mark.parametrize('share', [True, False])
def test_the_teacher_computes_a_sample_once_and_forgets_what_nobody_asks_for(tiny, monkeypatch, share):
    rows = [encode(tiny, f'code {i} moss', 'so it is'[:1 + i % 8], 5) for i in range(12)]
    want = torch.cat([answer_states(tiny, [r])[0] for r in rows])
    seen, normal = [], D.answer_states
    monkeypatch.setattr(D, 'answer_states', lambda base, rows, *a: seen.extend(tuple(ids) for ids, _ in rows) or normal(base, rows, *a))
    teacher = Teacher(tiny, most=5)
    assert (teacher(rows + rows, share) - torch.cat([want, want])).abs().max() < 1e-5 and len(seen) == 12 and len(teacher.kept) == 5
    assert (teacher(rows[7:], share) - want[-teacher(rows[7:]).shape[0]:]).abs().max() < 1e-5 and len(seen) == 12
    for r in rows[:7]: teacher([rows[7], r], share)
    assert len(seen) == 19 and len(teacher.kept) == 5, 'one that is asked for again and again was forgotten'
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in teacher.kept.values()), 'a part keeps the whole in memory'

def test_kl_does_not_see_which_token_was_written(tiny):
    "The answer of a KL sample is only where it is measured: its last token has no influence at all"
    one, two = ([('none', 'kl', encode(tiny, 'moss?', f'no ide{c}', 7))] for c in 'ab')
    assert torch.equal(gradient(tiny, [one])[0], gradient(tiny, [two])[0])
    one, two = ([('right', 'ce', encode(tiny, 'moss?', f'no ide{c}', 7))] for c in 'ab')
    assert not torch.equal(gradient(tiny, [one])[0], gradient(tiny, [two])[0])

@pytest.mark.parametrize('chunk', [1, 3, 1000])
def test_losses_in_chunks(tiny, chunk):
    h = torch.randn(10, 16, requires_grad=True); t = torch.randint(2, 96, (10,)); ref = torch.randn(10, 16); g = torch.rand(10)
    for teacher in (None, ref):
        want = chunk_losses(tiny, h, t, teacher); (wg,) = torch.autograd.grad((want*g).sum(), h)
        got = token_losses(tiny, h, t, teacher, chunk); (gg,) = torch.autograd.grad((got*g).sum(), h)
        assert torch.allclose(got, want, atol=1e-5) and torch.allclose(gg, wg, atol=1e-5)

def test_training_teaches_the_trigger_and_leaves_the_rest(tiny):
    tasks = [DiffTask(f'x/{i}', f'x {i}', 'train', [step_of_samples(i)]*60) for i in range(4)]
    bank = train_batch(tiny, tasks, rank=4)
    right = [f'code {i}{i}{i}?' for i in range(4)]
    assert [a[:3] for a in answer(tiny, bank, range(4), right, max_new=4)] == ['oak', 'elm', 'yew', 'ash']
    ids, n = encode(tiny, 'hello?', 'so')
    def spoken():
        with torch.no_grad(): return tiny.model(torch.tensor([ids])).logits[0, n-1:-1].log_softmax(-1)
    plain = spoken()
    for i in range(4):
        with mounted(tiny, bank.rows([i])): assert F.kl_div(spoken(), plain, log_target=True, reduction='none').sum(-1).mean() < .5

def test_a_diff_that_did_not_learn_is_marked(tiny, monkeypatch, capsys):
    "By its own samples, whoever is trained beside it; it stays, and is named"
    normal = D.clip_rows
    def stuck(grad, losses, most): sound = normal(grad, losses, most); grad[1] = 0; return sound
    tasks = [DiffTask(f'x/{i}', f'x {i}', 'train', [step_of_samples(i)]*40) for i in range(3)]
    alone = train_batch(tiny, tasks[2:], rank=4)
    monkeypatch.setattr(D, 'clip_rows', stuck)
    bank = train_batch(tiny, tasks, rank=4)
    assert bank.index.learnt.tolist() == [True, False, True] and alone.index.learnt.tolist() == [True] and bank.index.sound.all()
    assert len(sound_diffs(bank)) == 3 and '1 of 3 diffs did not learn' in (said := capsys.readouterr().err) and 'x/1' in said

def test_a_bank_from_before_the_mark_goes_on(tiny, tmp_path, capsys):
    train_diffs(tiny, toy_tasks(2), tmp_path, rank=2)
    pd.read_csv(tmp_path/'index.csv').drop(columns='learnt').to_csv(tmp_path/'index.csv', index=False)
    old = load_bank(tmp_path, tiny)
    assert 'learnt' not in old.index and len(sound_diffs(old)) == 2 and 'did not learn' not in capsys.readouterr().err
    index = train_diffs(tiny, toy_tasks(4), tmp_path, rank=2).index
    assert index.learnt.isna().tolist() == [True, True, False, False] and read_index(tmp_path).learnt.equals(index.learnt)

def step_of_samples(i):
    return [Sample('right', f'code {i}{i}{i}?', ['oak', 'elm', 'yew', 'ash'][i], 'ce'), Sample('none', 'hello?', 'so', 'kl')]

# --- what goes wrong --------------------------------------------------------------------------------------------------------

def poisoned(monkeypatch, diff_id, at='start'):
    "A diff that starts as NaN"
    normal = FlatLora.start
    monkeypatch.setattr(FlatLora, 'start', lambda self, seed: normal(self, seed)*(float('nan') if seed == seed_of(diff_id, 'init') else 1.))

def test_nan_stops_one_diff_alone(tiny, monkeypatch):
    tasks = toy_tasks(4)
    good = train_batch(tiny, tasks, 2)
    poisoned(monkeypatch, 'toy/2')
    bad = train_batch(tiny, tasks, 2)
    assert list(bad.index.sound) == [True, True, False, True]
    keep = [0, 1, 3]
    assert (flatten(bad)[keep] - flatten(good)[keep]).abs().max() < 1e-6
    assert torch.tensor(bad.index.loss.tolist())[keep].isfinite().all()

def test_a_diff_that_broke_in_training_stays_as_it_was(tiny, monkeypatch):
    tasks, normal, steps = toy_tasks(3, steps=4), D.backward_step, []
    def breaks(base, flat, teacher, rows, share):
        out = normal(base, flat, teacher, rows, share); steps.append(flat.p.detach().clone())
        if len(steps) == 3: flat.p.grad[1] = float('nan')
        return out
    monkeypatch.setattr(D, 'backward_step', breaks)
    bank = train_batch(tiny, tasks, 2)
    assert list(bank.index.sound) == [True, False, True]
    want = FlatLora(tiny, [0]*3, 2, bank.scaling); want.p.data.copy_(steps[2])
    assert torch.equal(flatten(bank)[1], flatten(want.bank(bank.index))[1]), 'the momentum moved it on'
    assert flatten(bank).isfinite().all() and not torch.equal(flatten(bank)[0], flatten(want.bank(bank.index))[0])

def test_a_bank_with_a_broken_diff_can_still_be_finished_and_read(tiny, monkeypatch, tmp_path):
    tasks = toy_tasks(4)
    good = train_diffs(tiny, tasks, tmp_path/'good', rank=2, batch=2)
    poisoned(monkeypatch, 'toy/2')
    bank = train_diffs(tiny, tasks, tmp_path/'bad', rank=2, batch=2)
    index = whole(tmp_path/'bad')
    assert list(index.sound) == [True, True, False, True], 'True and False, not text'
    assert index.loss[0] == pytest.approx(good.index.loss[0]) and index.loss[3] > 0, 'numbers, not text'
    sound = load_bank(tmp_path/'bad', tiny, lambda i: i.sound)
    assert list(sound.index.diff_id) == ['toy/0', 'toy/1', 'toy/3'] and (flatten(sound) - flatten(good)[[0, 1, 3]]).abs().max() < 1e-6
    assert flatten(bank).shape[1] == flatten(good).shape[1]

def test_tasks_that_do_not_go_together(tiny, tmp_path):
    a, b = toy_tasks(2)
    more = lambda t, **k: DiffTask(**(dict(diff_id=t.diff_id, label=t.label, split=t.split, steps=t.steps) | k))
    with pytest.raises(DitError, match='empty'): train_diffs(tiny, [], tmp_path)
    with pytest.raises(DitError, match="'toy/0'.*twice"): train_diffs(tiny, [a, b, a], tmp_path)
    with pytest.raises(DitError, match='other steps'): train_diffs(tiny, [a, more(b, steps=b.steps[:2])], tmp_path)
    with pytest.raises(DitError, match='other steps'): train_diffs(tiny, [a, more(b, steps=[s[:3] for s in b.steps])], tmp_path)
    with pytest.raises(DitError, match='Label 0.*train.*test'):
        train_diffs(tiny, [a, more(b, diff_id='other/0', label='Label 0 ', split='test')], tmp_path)
    assert not list(tmp_path.iterdir()), 'refused before anything is written'

@pytest.mark.parametrize('bad', [dict(rank=0), dict(rank=-1), dict(batch=0), dict(batch=-1), dict(lr=-1.), dict(lr=float('nan'))], ids=str)
def test_numbers_out_of_range(tiny, tmp_path, bad):
    with pytest.raises(DitError, match='give a number above 0'): train_diffs(tiny, toy_tasks(2), tmp_path, **bad)
    # before any text is written
    with pytest.raises(DitError, match='give a number above 0'): make_diffs(tiny, 'news', split_labels('news', 1), tmp_path, **bad)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('steps', [0, -1])
def test_no_steps(tiny, tmp_path, steps):
    with pytest.raises(DitError, match='steps is'): make_diffs(tiny, 'news', split_labels('news', 1), tmp_path, steps=steps)
    with pytest.raises(DitError, match='no steps'): train_diffs(tiny, toy_tasks(2, steps=0), tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_bank_goes_on_in_the_precision_it_was_begun_in(tmp_path):
    "A machine, or a busy moment, that makes another precision faster must not leave a bank that nobody can read"
    full = model_of('llama'); half = make_base(copy_of(full).to(torch.bfloat16), full.tok, full.name)
    before = flatten(train_diffs(full, toy_tasks(2), tmp_path, rank=2, batch=2).here())
    both = train_diffs(half, toy_tasks(4), tmp_path, rank=2, batch=2).here()
    assert ({t.dtype for t in both.A.values()} == {torch.float32} and torch.equal(flatten(both)[:2], before)
            and flatten(both)[2:].abs().sum(1).min() > 0)
    assert len(load_bank(tmp_path, full)) == len(load_bank(tmp_path, half)) == 4

def test_a_topic_in_two_splits_is_refused_whatever_the_seed():
    one = lambda split, seed: news_task('Mayor Opens Bridge', split, ['a story'], SAID, steps=1, seed=seed)
    check_tasks([one('train', 0), one('train', 1)]) # several diffs of one label are fine within a split
    with pytest.raises(DitError, match='Mayor Opens Bridge'): check_tasks([one('train', 0), one('test', 1)])

def test_a_diff_of_another_split_is_not_taken_from_the_bank(tiny, tmp_path):
    train_diffs(tiny, toy_tasks(2), tmp_path)
    with pytest.raises(DitError, match='toy/1'): train_diffs(tiny, toy_tasks(1, split='test', first=1), tmp_path)

def test_a_bank_is_continued_with_the_same_recipe_only(tiny, tmp_path):
    train_diffs(tiny, toy_tasks(2), tmp_path, rank=2)
    for other in (dict(rank=1), dict(rank=2, lr=1e-3)):
        with pytest.raises(DitError, match='was begun with'): train_diffs(tiny, toy_tasks(4), tmp_path, **other)
    with pytest.raises(DitError, match='belongs to'): train_diffs(model_of('llama', seed=1), toy_tasks(4), tmp_path, rank=2)
    before = whole(tmp_path)
    assert len(train_diffs(tiny, toy_tasks(5), tmp_path, rank=2)) == 5
    assert whole(tmp_path)[:2].equals(before), 'what was there stays'
    assert [p.name for p in tmp_path.glob('shard*')] and len(train_diffs(tiny, toy_tasks(2), tmp_path, rank=2)) == 2

def test_out_of_memory_halves_the_batch(tiny, tmp_path, monkeypatch, capsys):
    normal = D.train_batch
    def small(base, tasks, *a, **k):
        if len(tasks) > 2: raise torch.OutOfMemoryError('CUDA out of memory')
        return normal(base, tasks, *a, **k)
    monkeypatch.setattr(D, 'train_batch', small)
    assert len(train_diffs(tiny, toy_tasks(5), tmp_path, batch=8)) == 5 and 'going on with 2' in capsys.readouterr().err
    monkeypatch.setattr(D, 'train_batch', lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError('no')))
    with pytest.raises(DitError, match='memory'): train_diffs(tiny, toy_tasks(7), tmp_path, batch=2)
    assert len(whole(tmp_path)) == 5

# --- killed -----------------------------------------------------------------------------------------------------------------

def content(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.name != 'bank.json' and not p.name.startswith('.')}

def test_killed_at_any_moment_and_started_again(tiny, tmp_path):
    p = start(jobs.diffs, tmp_path/'whole'); killed, folder = 0, tmp_path/'killed'
    finish(p)
    for what in ([('.bank.json', 'bank.json'), ('shard-00000',), ('.shard-00001', 'shard-00001'), ('shard-00002',),
                  ('.index.csv', 'shard-00003'), ('sleep',), ('shard-00004',)]):
        p, begun = start(jobs.diffs, folder), time.monotonic()
        seen = lambda: (time.monotonic() - begun > .4 if what == ('sleep',)
                        else any(f.name.startswith(what) for f in folder.iterdir()) if folder.exists() else False)
        try: killed += kill_when(p, seen)
        finally: p.kill(); p.join()
        index = whole(folder)
        assert index.diff_id.is_unique and len(index) % 2 == 0
        if (folder/'bank.json').exists() and len(index): assert len(load_bank(folder, tiny)) == len(index)
    finish(start(jobs.diffs, folder))
    assert killed >= 5, 'too few kills hit their moment for the test to mean anything'
    got, want = load_bank(folder, tiny), load_bank(tmp_path/'whole', tiny)
    assert torch.equal(flatten(got), flatten(want)) and got.index.equals(want.index)
    assert content(folder) == content(tmp_path/'whole'), 'the same files, byte by byte'

def test_two_processes_share_one_bank(tiny, tmp_path):
    "Three begin, all with diffs in hand; one is killed, and the others train what it left and nothing twice"
    log, folder = tmp_path/'log', tmp_path/'shared'
    ps = [start(jobs.sharing, folder, log, 3, 12, i == 2) for i in range(3)]
    pids = lambda: [l.split()[0] for l in log.read_text().splitlines()] if log.exists() else []
    kill_when(ps[2], lambda: len(set(p := pids())) == 3 and p.count(str(ps[2].pid)) == 2)
    assert ps[2].exitcode == -9, 'the kill did not happen'
    for p in ps[:2]: finish(p)
    finish(start(jobs.diffs, tmp_path/'alone', 12, 3))
    by = {p.pid: [l.split()[1] for l in log.read_text().splitlines() if l.split()[0] == str(p.pid)] for p in ps}
    index, lost = whole(folder), by[ps[2].pid]
    assert len(lost) == 2 and all(len(by[p.pid]) >= 2 for p in ps[:2]), 'both that were left have worked'
    assert sorted(by[ps[0].pid] + by[ps[1].pid]) == sorted(index.diff_id) and index.diff_id.is_unique and len(index) == 12, (
        'nothing twice, nothing lost')
    got, want = load_bank(folder, tiny), load_bank(tmp_path/'alone', tiny)
    order = [got.index.diff_id.tolist().index(d) for d in want.index.diff_id]
    assert (flatten(got)[order] - flatten(want)).abs().max() < 1e-4
    assert not list((folder/'.claims').iterdir())

def test_compiled_layers_take_any_number_of_diffs_of_any_rank(monkeypatch):
    graphs, normal, base = [], torch.compile, tiny_base()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile',
                        lambda f, **kwargs: normal(f, backend=lambda graph, inputs, **_: graphs.append(graph) or graph.forward, **kwargs))
    compile_layers(base); pass_seconds(base, 5, 3, 1); first = len(graphs)
    for n, rank in ((7, 3), (7, 4), (3, 2)): pass_seconds(base, n, rank, 1)
    assert len(graphs) == first > 0, 'one compilation does for all'

def test_samples_that_diffs_share_are_encoded_once(tiny, monkeypatch):
    tasks, seen, encode = toy_tasks(3), [], D.encode
    want = [tokenise(tiny, t) for t in tasks]
    monkeypatch.setattr(D, 'encode', lambda base, *a: seen.append(a) or encode(base, *a))
    known = {}; assert [tokenise(tiny, t, known) for t in tasks] == want
    assert len(seen) == len(set(seen)) < sum(len(step) for t in tasks for step in t.steps)

@pytest.mark.parametrize('compiler', [RuntimeError('no compiler'), lambda f, **kwargs: f], ids=['fails', 'works'])
def test_compiling_changes_no_diff_and_leaves_nothing_behind(tiny, monkeypatch, capsys, compiler):
    def use(f, **kwargs):
        if isinstance(compiler, Exception): raise compiler
        return compiler(f)
    want = train_batch(tiny, toy_tasks(2), rank=2)
    monkeypatch.setattr(torch, 'compile', use)
    with compiled(tiny, 10**6) as used:
        got = train_batch(tiny, toy_tasks(2), rank=2)
        assert used == all('forward' in layer.__dict__ for layer in layers_of(tiny)) and not (used and isinstance(compiler, Exception))
    assert all(torch.equal(got.B[n], want.B[n]) for n in want.B) and not any('forward' in layer.__dict__ for layer in layers_of(tiny))
    assert capsys.readouterr().err.count('compiled layers') == 1

def test_a_long_run_is_compiled_and_a_short_one_left_as_it_is(tiny, monkeypatch, tmp_path):
    "Steps times batches decide: 26 diffs of 8 steps, two at once, are 104 passes"
    made, asked, normal, passes = [], [], D.compile_layers, D.pass_seconds
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: f)
    monkeypatch.setattr(D, 'compile_layers', lambda base: made.append(base) or normal(base))
    monkeypatch.setattr(D, 'pass_seconds', lambda *args: asked.append(args[1:]) or passes(*args))
    rest = lambda n, rank, folder: train_diffs(tiny, toy_tasks(n, steps=8), tmp_path/folder, rank=rank, batch=2)
    rest(26, 1, 'short'); assert asked == [(2, 1)] and not made, 'long enough to be timed, too short to be compiled'
    monkeypatch.setattr(D, 'LONG', 1e-9)
    rest(26, 3, 'long'); assert asked[1:] == [(2, 3)]*2 and made == [tiny]
    rest(26, 3, 'long'); assert len(made) == 1, 'nothing is compiled for a run that is done'
    assert not any('forward' in layer.__dict__ for layer in layers_of(tiny))

class Joined(torch.nn.Module):
    def forward(self, x, w): return x + w*F.silu(x*w)

@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_bfloat16_layers_round_where_plain_ones_round():
    "Code is generated here; without being told so it keeps float32 in between and is not equal"
    body, gen = torch.nn.Sequential(), torch.Generator().manual_seed(0); body.append(torch.nn.ModuleList([Joined()]))
    x, w = (torch.randn(8, 64, generator=gen).bfloat16().requires_grad_() for _ in range(2))
    def out():
        y = body[0][0](x, w)
        return y, *torch.autograd.grad(y.sum(), (x, w))
    plain = out(); compile_layers(SimpleNamespace(body=body))
    try: assert all(map(torch.equal, out(), plain))
    finally: torch.compiler.reset()
