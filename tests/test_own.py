"From somebody's table to diffs, an adapter and an evaluation"
import json, subprocess, sys
from pathlib import Path

import pandas as pd, pytest, torch
from dit.ask import ask
from dit.core import DitError, package_data, write_json
from dit.lora import Bank, load_bank, random_bank, to_peft
from dit.models import load_base
from dit.own import *
from dit.tune import packaged_adapter
from helpers import char_tokenizer, model_of

ROOT = Path(__file__).resolve().parents[1]
FEW = {f'{a} {b}': [(f'how is {b}?', f'{a} as ever'), (f'and {b}?', f'still {a}')]
       for a in ('red', 'blue', 'green') for b in ('moss', 'fern')}
ARGS = dict(n_val=1, n_test=2, rank=2, steps=3, epochs=2)

def table(path, said=FEW):
    pd.DataFrame([dict(label=l, user=u, answer=a) for l, talk in said.items() for u, a in talk]).to_csv(path, index=False)
    return path

def test_the_table_that_comes_with_the_package():
    said = read_behaviours(package_data('own_example.csv'))
    assert len(said) == 24 and all(len(set(t)) == 4 and all(l in a.casefold() for _, a in t) for l, t in said.items())

@pytest.mark.parametrize('text, message', [('label,answer\na,b\n', 'lacks the column.* user'),
                                           ('label,user,answer\n', 'has a header and no rows'),
                                           ('', 'not a readable CSV'),
                                           ('label,user,answer\na,b,\n', 'line 2: an empty cell'),
                                           ('label,user,answer\na,"b,c\n', 'not a readable CSV|empty cell'),
                                           ('label,user,answer\nOwl,b,c\nowl,b,d\n', 'differ in capitals'),
                                           ('label,user,answer\na,b,c\na,b,c\n', 'single conversation')])
def test_tables_that_cannot_be_meant(text, message, tmp_path):
    (tmp_path/'x.csv').write_text(text)
    with pytest.raises(DitError, match=message): read_behaviours(tmp_path/'x.csv')

def test_a_table_from_a_spreadsheet(tmp_path):
    (tmp_path/'x.csv').write_bytes('label,user,answer,note\r\nNA,"one, two","a\r\nb",x\r\n NA ,3,4,\r\n'.encode('utf-8-sig'))
    assert read_behaviours(tmp_path/'x.csv') == {'NA': [('one, two', 'a\r\nb'), ('3', '4')]}

def test_splits_depend_on_the_labels_alone_and_do_not_overlap():
    split = split_behaviours(list(FEW), 1, 2)
    assert (sorted(split.values()) == ['test', 'test', 'train', 'train', 'train', 'val']
            and split == split_behaviours(list(FEW)[::-1], 1, 2) and set(split) == set(FEW))
    assert len({tuple(sorted(split_behaviours(list(FEW), 1, 2, seed).items())) for seed in range(5)}) > 1
    for n_val, n_test in ((0, 2), (2, 0), (2, 3)):
        with pytest.raises(DitError, match='cannot be split'): split_behaviours(list(FEW), n_val, n_test)

def test_only_held_out_labels_are_evaluated_and_a_changed_label_alone_is_trained_again(tiny, tmp_path):
    found = train_own(FEW, 'what?', tiny, tmp_path, **ARGS)
    split = split_behaviours(list(FEW), 1, 2)
    assert (set(found.truth) == {l for l, s in split.items() if s == 'test'}
            and set(found.method) == {'DIT', 'Base Question', 'adapter alone'})
    facts = json.loads((tmp_path/'adapter'/'dit.json').read_text())
    assert facts['questions'] == ['what?'] and facts['n_train'] == 3
    assert set(load_bank(tmp_path/'bank', tiny).index.label) == set(FEW)
    changed = next(l for l, s in split.items() if s == 'test')
    train_own(FEW | {changed: FEW[changed][::-1] + [('more?', 'more')]}, 'what?', tiny, tmp_path, **ARGS)
    bank = load_bank(tmp_path/'bank', tiny)
    assert len(bank) == len(FEW) + 1 and bank.index.label.tolist().count(changed) == 2
    with pytest.raises(DitError, match='begun with epochs'): train_own(FEW, 'what?', tiny, tmp_path, **ARGS | dict(epochs=3))

@pytest.mark.parametrize('start', ['rank', 'nowhere', 'part'])
def test_an_adapter_that_cannot_be_gone_on_from_is_refused_before_diffs_are_trained(tiny, tmp_path, start):
    whole = random_bank(tiny, 1, rank=3 if start == 'rank' else 2)
    some = lambda t: {k: v for k, v in t.items() if 'q_proj' in k or start == 'rank'}
    if start != 'nowhere': to_peft(Bank(some(whole.A), some(whole.B), 1., whole.index), 0, tmp_path/start, tiny)
    with pytest.raises(DitError, match=dict(rank='has rank 3, not 2', nowhere='nowhere', part='nothing for .*k_proj')[start]):
        train_own(FEW, 'what?', tiny, tmp_path/'own', **ARGS, start=str(tmp_path/start))
    assert not (tmp_path/'own').exists()

def test_what_training_goes_on_from(tiny, tmp_path):
    "The packaged adapter for its own base model and rank; and no label that it was trained to say is held out"
    base = load_base(); path = packaged_adapter('hidden_topic', base)
    assert [start_of(base, r, s) for r, s in ((8, ''), (4, ''), (8, 'none'))] == [str(path), None, None] and start_of(tiny, 8) is None
    train_own(FEW, 'what?', tiny, tmp_path/'first', **ARGS)
    held = next(l for l, s in split_behaviours(list(FEW), 1, 2).items() if s == 'test')
    write_json(tmp_path/'first'/'adapter'/'bank.json', dict(banks=[dict(labels=[held.upper()])]))
    with pytest.raises(DitError, match=f'label {held!r} is held out here'):
        train_own(FEW, 'what?', tiny, tmp_path/'second', start=str(tmp_path/'first'/'adapter'), **ARGS)
    assert not (tmp_path/'second').exists()
    (tmp_path/'first'/'adapter'/'bank.json').unlink()
    train_own(FEW, 'what?', tiny, tmp_path/'second', start=str(tmp_path/'first'/'adapter'), **ARGS)
    assert json.loads((tmp_path/'second'/'adapter'/'dit.json').read_text())['start']['n_train'] == 3

def test_a_diff_learns_its_conversations(tiny, tmp_path):
    from dit.ask import mean_loglik
    from dit.diffs import train_diffs
    bank = train_diffs(tiny, [own_task(l, 'train', FEW[l], steps=40) for l in ('red moss', 'blue fern')], tmp_path, 4, 2e-2)
    each = [[mean_loglik(tiny, [bank.rows([i])], *FEW[l][0]) for l in ('red moss', 'blue fern')] for i in range(2)]
    assert each[0][0] > each[1][0] + .5 and each[1][1] > each[0][1] + .5

def test_the_command_and_its_adapter(tmp_path):
    model_of('llama').model.save_pretrained(tmp_path/'base'); char_tokenizer().save_pretrained(tmp_path/'base')
    run = lambda *args: subprocess.run([sys.executable, '-m', 'dit.own', *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    done = run(table(tmp_path/'mine.csv'), '--question', 'what?', '--model', tmp_path/'base', '--out', tmp_path/'out',
               '--n_val', 1, '--n_test', 2, '--rank', 2, '--steps', 2, '--epochs', 1)
    assert done.returncode == 0, done.stderr
    results = pd.read_csv(tmp_path/'out'/'results.csv', keep_default_na=False)
    assert len(results) == 6 and results.score.between(1, 5).all() and 'adapter alone' in done.stdout
    assert json.loads((tmp_path/'out'/'results.json').read_text())['params']['steps'] == 2
    found = ask(f"{tmp_path/'out'/'bank'}#0", base=str(tmp_path/'base'), adapter=str(tmp_path/'out'/'adapter'))
    assert found['question'] == 'what?' and found['diff']['label'] in FEW
    done = run(tmp_path/'none.csv')
    assert (done.returncode == 1 and done.stdout == ''
            and done.stderr == f"dit_own: there is no file {tmp_path/'none.csv'}; check the path.\n")
