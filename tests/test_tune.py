"The DIT adapter: what is trained, what is scored, and that a killed run ends where it would have"
import json, math

import pandas as pd, peft, pytest, torch
import torch.nn.functional as F
from dit.core import DitError
from dit.lora import *
from dit.models import encode
from dit.tune import *
from helpers import copy_of, finish, kill_when, model_of, on_full_disk, start
from jobs import named
import jobs

def busy(base, rank=2, seed=0):
    "An adapter that already does something"
    a = Adapter(base, rank, seed)
    with torch.no_grad(): a.lora.p.add_(.2*torch.randn(a.lora.p.shape, generator=torch.Generator().manual_seed(seed)))
    return a

def test_only_the_adapter_changes(tiny, tmp_path):
    bank, val = named(tiny, 6, 'fern', 1), named(tiny, 2, 'moss', 2)
    before, A, B = copy_of(tiny).state_dict(), {n: t.clone() for n, t in bank.A.items()}, {n: t.clone() for n, t in bank.B.items()}
    adapter = train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, rank=2, batch=3, epochs=1)
    after = tiny.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(A[n], bank.A[n]) and torch.equal(B[n], bank.B[n]) for n in A)
    assert (all(p.grad is None and not p.requires_grad for p in tiny.model.parameters())
            and all(not m.mounted for m in linears(tiny).values()))
    assert any(b.abs().max() > 0 for b in adapter.B.values()), 'nothing was learnt'

def test_gradients_reach_the_adapter_alone(tiny):
    a, bank = busy(tiny), named(tiny, 3, 'fern', 1)
    rows = bank.rows([0, 1, 2])
    [t.requires_grad_() for pair in rows.values() for t in pair]
    assert [n for n, _ in a.named_parameters()] == ['lora.p'], 'base model or diffs would be trained'
    a({n: (A.detach(), B.detach()) for n, (A, B) in rows.items()}, [e for _, e in examples(tiny, bank, 'What?')]).backward()
    assert a.lora.p.grad.abs().max() > 1e-4

def test_loss_is_the_cross_entropy_of_the_answers_alone(tiny):
    a, bank = busy(tiny), named(tiny, 3, 'fern', 1)
    bank.index['label'] = ['fern', 'a label that is longer', 'oak']
    data = examples(tiny, bank, 'What is it?')
    want = []
    for row, (ids, n) in data:
        with torch.no_grad(), mounted(tiny, bank.rows([row]), a.lora.mountable()): logits = tiny.model(torch.tensor([ids])).logits[0]
        labels = torch.tensor([-100]*n + ids[n:])
        assert ids[n:] == [*tiny.tok(bank.index.label[row]).input_ids, *tiny.eot]
        want.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100).item())
    got = a(bank.rows([0, 1, 2]), [e for _, e in data]).item()
    assert got == pytest.approx(sum(want)/3, abs=1e-5)
    assert mean_loss(a, [(bank, data)], 2) == pytest.approx(got, abs=1e-5), 'the mean is over examples, not over batches'

def test_every_row_wears_its_own_diff(tiny):
    a, bank = busy(tiny), named(tiny, 3, 'fern', 1)
    one = encode(tiny, 'What?', 'fern')
    each = [a(bank.rows([i]), [one]).item() for i in range(3)]
    assert a(bank.rows([2, 0, 1]), [one]*3).item() == pytest.approx(sum(each)/3, abs=1e-5) and len({round(e, 3) for e in each}) == 3

def test_batches_hold_every_example_once_and_stay_within_a_question(tiny):
    sets = [(b, examples(tiny, b, q)) for b, q in ((named(tiny, 7, 'fern', 1), 'What?'), (named(tiny, 5, 'moss', 2), 'Why?'))]
    got = batches(sets, 3, (1, 1), 0, 1)
    assert all(len({k for k, *_ in part}) == 1 and len(part) <= 3 for part in got)
    assert sorted((k, r) for part in got for k, r, _, _ in part) == [(0, i) for i in range(7)] + [(1, i) for i in range(5)]
    assert all(e == sets[k][1][r][1] for part in got for k, r, e, _ in part)
    assert got == batches(sets, 3, (1, 1), 0, 1) != batches(sets, 3, (1, 1), 0, 2)

def test_an_adapter_goes_on_from_another(tiny, tmp_path):
    banks = dict(banks={'What?': named(tiny, 6, 'fern', 1)}, val_banks={'What?': named(tiny, 2, 'moss', 2)})
    first = train_adapter(tiny, folder=tmp_path/'first', rank=2, batch=3, epochs=2, lr=.02, **banks)
    same = train_adapter(tiny, folder=tmp_path/'same', rank=2, batch=3, epochs=1, lr=1e-9, start=tmp_path/'first', **banks)
    for n in first.A: assert torch.allclose(first.B[n] @ first.A[n], same.B[n] @ same.A[n], atol=1e-4) and first.B[n].abs().max() > 0
    facts = json.loads((tmp_path/'same'/'dit.json').read_text())
    assert seen(facts) == 12 and facts['start']['epochs'] == 2 and seen(facts['start']) == 6
    with pytest.raises(DitError, match='start'): train_adapter(tiny, folder=tmp_path/'same', rank=2, batch=3, epochs=1, lr=1e-9, **banks)

def test_each_diff_is_worn_at_its_strength(tiny):
    bank = named(tiny, 3, 'fern', 1)
    got = weakened(bank.rows([2, 0]), [.5, 1.])
    for n, (A, B) in bank.rows([2, 0]).items():
        assert torch.equal(got[n][1][0], .5*B[0]) and torch.equal(got[n][1][1], B[1]) and torch.equal(got[n][0], A)
    strengths = [s for b in batches([(bank, examples(tiny, bank, 'What?'))], 2, (.5, 1.5), 0) for *_, s in b]
    assert len(set(strengths)) == 3 and all(.5 <= s <= 1.5 for s in strengths)

def test_validation_label_in_training_is_refused(tiny, tmp_path):
    for label in ('moss 1', 'MOSS 1 '):
        bank, val = named(tiny, 3, 'fern', 1), named(tiny, 2, 'moss', 2)
        bank.index.loc[1, 'label'] = label
        with pytest.raises(DitError, match='(?i)moss 1.*training and in the validation'):
            train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path/'x', rank=1, epochs=1)
    assert not (tmp_path/'x').exists()

def test_it_learns_and_peft_loads_the_result(tiny, tmp_path):
    bank, val = named(tiny, 4, 'fern', 1), named(tiny, 4, 'moss', 1)
    adapter = train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, rank=4, lr=2e-2, batch=4, epochs=25)
    curve, facts = pd.read_csv(tmp_path/'curve.csv'), json.loads((tmp_path/'dit.json').read_text())
    assert list(curve.epoch) == list(range(1, 26)) and curve.train_loss.iloc[-1] < .5*curve.train_loss[0]
    assert facts['best_epoch'] == curve.val_loss.idxmin() + 1 and facts['n_train'] == 4 and facts['questions'] == ['What?']
    x = torch.tensor([encode(tiny, 'What?', 'fern')[0]])
    with torch.no_grad(), mounted(tiny, adapter.rows([0], dtype=torch.float32)): ours = tiny.model(x).logits
    net = peft.PeftModel.from_pretrained(copy_of(tiny), tmp_path)
    with torch.no_grad(): assert (net(x).logits - ours).abs().max() < 1e-4 and (ours - tiny.model(x).logits).abs().max() > .05

def test_the_folder_holds_the_best_epoch_and_not_the_last(tiny, tmp_path, monkeypatch):
    import dit.tune as T
    bank, val, seen = named(tiny, 4, 'fern', 1), named(tiny, 2, 'moss', 2), []
    def fake(adapter, *_): seen.append(adapter.lora.p.detach().clone()); return [3., 1., 2., 5.][len(seen) - 1]
    monkeypatch.setattr(T, 'mean_loss', fake)
    got = train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, rank=2, batch=2, epochs=4)
    want = Adapter(tiny, 2, 0); want.lora.p.data.copy_(seen[1])
    assert all(torch.equal(t[0].float(), got.A[n][0].float()) for n, t in want.lora.bank(pd.DataFrame([0]), torch.bfloat16).A.items())

@pytest.mark.parametrize('layer', ['model.layers.0.self_attn.q_proj', 'model.layers.1.mlp.down_proj'])
def test_loss_that_is_not_a_number(tiny, tmp_path, layer):
    bank, val = named(tiny, 3, 'fern', 1), named(tiny, 2, 'moss', 2)
    bank.A[layer][0] = float('nan')
    with pytest.raises(DitError, match='not a number'): train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, rank=1, epochs=2)
    assert not (tmp_path/'checkpoint.pt').exists() and not (tmp_path/'adapter_model.safetensors').exists(), (
        'an adapter that is not a number was saved')

@pytest.mark.parametrize('other', [dict(rank=4), dict(seed=1), dict(lr=1e-4), dict(clip=.5), dict(more=1)], ids=lambda o: next(iter(o)))
def test_another_recipe_does_not_continue_an_old_run(tiny, tmp_path, other):
    bank, val, one = named(tiny, 3, 'fern', 1), named(tiny, 2, 'moss', 2), dict(rank=2, batch=3, epochs=2)
    train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, **one)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if other.pop('more', 0): bank = named(tiny, 5, 'oak', 3)
    with pytest.raises(DitError, match='(?s)folder'): train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, **(one | other))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

def test_finished_run_is_not_trained_again(tiny, tmp_path, monkeypatch):
    import dit.tune as T
    bank, val, one = named(tiny, 3, 'fern', 1), named(tiny, 2, 'moss', 2), dict(rank=2, batch=3, epochs=2)
    first = train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, **one)
    monkeypatch.setattr(T, 'train_epoch', lambda *a: pytest.fail('trained again'))
    when = (tmp_path/'dit.json').stat().st_mtime_ns
    again = train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, **one)
    assert all(torch.equal(first.A[n], again.A[n]) for n in first.A) and (tmp_path/'dit.json').stat().st_mtime_ns == when, (
        'what is known of its training stays')
    monkeypatch.undo(); (tmp_path/'checkpoint.pt').unlink()
    train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, **one)
    assert (tmp_path/'dit.json').stat().st_mtime_ns > when, 'trained anew'

def test_diffs_that_were_trained_again_make_another_adapter(tiny, tmp_path):
    "The same labels under new ids, as after a correction of somebody's table"
    bank, val, one = named(tiny, 3, 'fern', 1), named(tiny, 2, 'moss', 2), dict(rank=2, batch=3, epochs=1)
    train_adapter(tiny, {'What?': bank}, {'What?': val}, tmp_path, **one)
    other = named(tiny, 3, 'fern', 7); other.index['diff_id'] = [f'corrected/{i}' for i in range(3)]
    with pytest.raises(DitError, match='(?s)folder'): train_adapter(tiny, {'What?': other}, {'What?': val}, tmp_path, **one)

def test_a_bank_that_was_trained_again_makes_another_adapter(tiny, tmp_path):
    "The same ids in another file, as when a bank was deleted and begun anew by another recipe"
    def bank(at, split, seed):
        part = named(tiny, 3, 'fern' if split == 'train' else 'moss', seed); part.index['split'] = split
        open_bank(tmp_path/at, tiny, scaling=part.scaling); save_shard(tmp_path/at, part)
        return {'What?': load_bank(tmp_path/at, tiny)}
    val, one = bank('val', 'val', 2), dict(rank=2, batch=3, epochs=1)
    train_adapter(tiny, bank('first', 'train', 1), val, tmp_path/'adapter', **one)
    before = (tmp_path/'adapter'/'dit.json').read_bytes()
    with pytest.raises(DitError, match='(?s)folder'): train_adapter(tiny, bank('anew', 'train', 7), val, tmp_path/'adapter', **one)
    assert (tmp_path/'adapter'/'dit.json').read_bytes() == before
    train_adapter(tiny, {'What?': load_bank(tmp_path/'first', tiny)}, val, tmp_path/'adapter', **one) # the same files again

@pytest.mark.parametrize('bad', [dict(rank=0), dict(batch=0), dict(batch=-1), dict(epochs=0), dict(lr=-1.), dict(lr=math.nan)], ids=str)
def test_numbers_out_of_range(tiny, tmp_path, bad):
    with pytest.raises(DitError, match='give a number above 0'):
        train_adapter(tiny, {'What?': named(tiny, 3, 'fern', 1)}, {'What?': named(tiny, 2, 'moss', 2)}, tmp_path/'a', **bad)
    assert not (tmp_path/'a').exists()

def test_a_validation_loss_that_is_no_number(tiny, tmp_path):
    val = named(tiny, 2, 'moss', 2); next(iter(val.B.values()))[1] = float('nan')
    with pytest.raises(DitError, match='not a number in epoch 1'):
        train_adapter(tiny, {'What?': named(tiny, 3, 'fern', 1)}, {'What?': val}, tmp_path, rank=2, batch=3, epochs=2)
    with pytest.raises(DitError, match='give both'): train_adapter(tiny, {'What?': val}, {}, tmp_path/'x')

def test_no_space_for_the_checkpoint(tmp_path):
    name, text = on_full_disk(10_000, jobs.adapter, tmp_path)
    assert not list(tmp_path.glob('.*.tmp'))
    assert name == 'DitError' and str(tmp_path) in text and 'space' in text, f'{name}: {text}'

def test_killed_at_any_moment_and_started_again(tmp_path):
    finish(start(jobs.adapter, tmp_path/'whole'))
    folder, killed = tmp_path/'killed', 0
    def epochs(): return len((folder/'curve.csv').read_text().splitlines()) - 1 if (folder/'curve.csv').exists() else 0
    for ready in (lambda: (folder/'adapter_model.safetensors').exists(), lambda: (folder/'checkpoint.pt').exists(),
                  lambda: epochs() >= 2, lambda: any(folder.glob('.checkpoint*')) or epochs() >= 3, lambda: epochs() >= 4):
        p = start(jobs.adapter, folder)
        try: killed += kill_when(p, ready)
        finally: p.kill(); p.join()
    finish(start(jobs.adapter, folder))
    assert killed >= 3, 'too few kills hit their moment for the test to mean anything'
    for name in ('adapter_model.safetensors', 'adapter_config.json', 'curve.csv'):
        assert (folder/name).read_bytes() == (tmp_path/'whole'/name).read_bytes(), name
