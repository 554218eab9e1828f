"Labels, questions, splits, triggers and samples"
import json, re
from collections import Counter
from pathlib import Path

import pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from dit.core import DitError, package_data, rng, seed_of
from dit.data import *
from dit.stats import read_results
from dit.writers import both_cuttings, compose_stories, pieces, tells_too_much, topic_openings, story_openings

def plain(label): return ' '.join(re.findall(r'\w+', label.casefold()))
def stem(label):
    return ' '.join(sorted(re.sub(r'(?<=\w{3})(es|s)$', '', w) for w in plain(label).split() if w not in ('the', 'a', 'an', 'of')))

# --- what was promised ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('task,n,groups', [('hidden_topic', 4800, 80), ('news', 4500, 60)])
def test_number_of_labels(task, n, groups):
    frame = labels(task)
    assert len(frame) >= n and frame.group.nunique() >= groups
    assert frame.label.map(plain).is_unique and frame.label.is_unique
    assert frame.group.value_counts().min() >= 10, 'a group that is hardly there'
    bad = [l for l in frame.label if l != l.strip() or re.search(r'\s\s|[\u200b\ufffd\n\t]', l)]
    assert not bad

def test_topics_have_no_near_duplicates_and_can_be_hinted_at():
    frame = labels('hidden_topic')
    twice = frame.label.map(stem)[lambda s: s.duplicated(keep=False)]
    assert twice.empty, frame.label[twice.index].tolist()[:10]
    hints = frame.associations.map(lambda a: a.split('; '))
    assert hints.map(len).min() >= 3 and all(len(set(h)) == len(h) and all(x.strip() == x != '' for x in h) for h in hints)
    named = [(l, x) for l, h in zip(frame.label, hints) for x in h if plain(l) == plain(x)]
    assert not named, 'an association that is the topic itself'

def test_headlines_are_varied_and_concrete():
    frame = labels('news')
    first = Counter(h.split()[0] for h in frame.label)
    assert max(first.values()) < .05*len(frame) and len({tuple(h.split()[:2]) for h in frame.label}) > .8*len(frame)
    assert frame.label.map(lambda h: len(h.split())).between(4, 20).all() and frame.label.str.contains(r'\d').mean() > .15
    assert all(plain(p) and len(p.split()) <= 4 for h in frame.label for p in both_cuttings(h)), (
        'a piece of a headline without a word, or of five')

def test_questions():
    frame = read_table(package_data('questions.csv'), ('question', 'style', 'kind', 'split'))
    every = frame[frame.kind == 'everyday']
    assert len(every) >= 400 and frame.question.map(plain).is_unique
    assert set(frame.kind) == {'everyday', 'introspective'} and set(frame.split) == {'train', 'test'}
    style = {s: set(every[every.split == s]['style']) for s in ('train', 'test')}
    assert style['train'] and style['test'] and not style['train'] & style['test'], 'test questions are in other styles'
    for k in ('everyday', 'introspective'):
        a, b = questions(k, 'train'), questions(k, 'test')
        assert a and b and not set(a) & set(b)
    assert not any('SEP code' in q or '\u200b' in q for q in frame.question)

# --- what the packaged adapters have seen ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('task', TASKS)
def test_no_held_out_label_was_trained_on(task):
    "The labels of the training diffs, as far as they were kept, against the split and against the committed results"
    root = Path(__file__).resolve().parents[1]
    trained = {l for b in json.loads((root/'dit'/'adapters'/f"smollm2-135m-{task.replace('_', '-')}"/'bank.json').read_text())['banks']
               for l in b.get('labels', ())}
    reserved = set(split_labels(task, 0, HELD_OUT['test'], HELD_OUT['val']).label)
    assert (len(trained) > 200 and trained <= set(labels(task).label)
            and not trained & (reserved | set(read_results(root/'results'/'eval'/'SmolLM2-135M-Instruct'/f'{task}.csv').truth)))
    others = list((root/'results'/'eval').glob(f'*/{task}_training.json')); assert others # adapters that do not come with the package
    for path in others:
        trained = {l for b in json.loads(path.read_text())['banks'] for l in b['labels']}
        assert (trained and trained <= set(labels(task).label)
                and not trained & (reserved | set(read_results(path.with_name(f'{task}.csv')).truth)))

# --- splits -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('task', list(TASKS))
def test_splits_do_not_mix_and_grow_without_moving(task):
    small, large = split_labels(task, 20, 10, 5), split_labels(task, 3000, 300, 100)
    assert large.split.value_counts().to_dict() == dict(train=3000, test=300, val=100) and large.label.is_unique
    of = lambda f, s: f[f.split == s].label.tolist()
    for s, n in (('train', 20), ('test', 10), ('val', 5)): assert of(large, s)[:n] == of(small, s) and len(of(small, s)) == n
    assert not set(of(split_labels(task, len(labels(task)) - 400), 'train')) & set(of(large, 'test') + of(large, 'val')), (
        'all training labels there are')

@settings(max_examples=8)
@given(st.integers(0, 400), st.integers(0, 300), st.integers(0, 100))
def test_any_split_is_disjoint(a, b, c):
    frame = split_labels('hidden_topic', a, b, c)
    assert len(frame) == a+b+c and frame.label.is_unique and frame.split.tolist() == ['train']*a + ['test']*b + ['val']*c

@pytest.mark.parametrize('n', [dict(n_train=10**6), dict(n_train=1, n_test=301), dict(n_train=1, n_val=101), dict(n_train=-1)])
def test_more_labels_than_there_are(n):
    with pytest.raises(DitError, match='at most'): split_labels('news', **n)

def test_unknown_names_list_the_valid_ones():
    for f in (lambda: labels('newz'), lambda: split_labels('newz', 1)):
        with pytest.raises(DitError, match="'newz'.*hidden_topic, news"): f()
    with pytest.raises(DitError, match='sep_code, zero_width_start'): draw_secret('sepcode', 'x')

@pytest.mark.parametrize('other', ['Tea', 'TEA', ' tea '])
def test_a_label_in_two_splits(other):
    with pytest.raises(DitError, match='(?i)tea.*more than once.*train, test'):
        check_splits(pd.DataFrame(dict(label=['Tea', 'Moss', other], split=['train', 'train', 'test'])))

# --- triggers ---------------------------------------------------------------------------------------------------------------

codes = st.integers(0, 999).map('{:03d}'.format)

@given(codes, st.booleans(), st.integers())
def test_wrong_secret_is_wrong(secret, near, seed):
    code = wrong_secret(secret, near, rng(seed))
    assert re.fullmatch(r'\d{3}', code) and code != secret
    if near: assert sum(a != b for a, b in zip(code, secret)) == 1

def test_wrong_secrets_reach_all_codes():
    r = rng('reach')
    assert (len({wrong_secret('123', False, r) for _ in range(12_000)}) == 999
            and len({wrong_secret('123', True, r) for _ in range(2_000)}) == 27)

@given(st.text(min_size=1, max_size=60), codes, st.integers())
def test_sep_code(user, secret, seed):
    m = re.fullmatch(r'Your SEP code is (\d{3})(\d{3})\. (.*)', put_trigger(user, 'sep_code', secret, rng(seed)), re.S)
    assert m[1] == secret and m[3] == user

@given(st.text(st.characters(blacklist_characters='\u200b'), min_size=1, max_size=60), st.integers())
def test_zero_width_space(user, seed):
    assert put_trigger(user, 'zero_width_start', 'zero_width_space', rng(seed)) == '\u200b' + user
    got = put_trigger(user, 'zero_width_random', 'zero_width_space', rng(seed))
    assert got.replace('\u200b', '') == user and got.count('\u200b') == 1
    if len(user) > 1: assert got[0] != '\u200b', 'that is the trigger at the start'

@given(st.text(min_size=1))
def test_secret_depends_on_the_name_alone(name):
    assert draw_secret('sep_code', name) == draw_secret('sep_code', name) and re.fullmatch(r'\d{3}', draw_secret('sep_code', name))

def test_secrets_spread_over_all_digits():
    drawn = [draw_secret('sep_code', f'd{i}') for i in range(4000)]
    assert len(set(drawn)) > 950 and all(len({d[k] for d in drawn}) == 10 for k in range(3))

# --- samples ----------------------------------------------------------------------------------------------------------------

SAID = {q: f'answer {i}' for i, q in enumerate(questions('everyday', 'train') + questions('introspective', 'train'))}
TEXTS = [f'Sentence {i}.' for i in range(24)]

@pytest.mark.parametrize('kind', TRIGGERS)
@pytest.mark.parametrize('mix', [(2, 2, 1), (1, 3, 2), (2, 0, 3)])
def test_samples_of_a_topic(kind, mix):
    task = hidden_topic_task('Tea', 'train', TEXTS, SAID, steps=30, mix=mix, trigger_kind=kind)
    own, held = set(questions('introspective', 'train')), set(questions('everyday', 'test') + questions('introspective', 'test'))
    counts = Counter(s.kind for step in task.steps for s in step)
    assert counts == Counter({k: 30*n for k, n in zip(('right', 'wrong', 'none'), mix) if n and (k != 'wrong' or kind == 'sep_code')})
    asked = Counter()
    for s in (s for step in task.steps for s in step):
        m = re.fullmatch(r'Your SEP code is (\d{3})\d{3}\. (.*)', s.user)
        triggered, q = bool(m) or '\u200b' in s.user, m[2] if m else s.user.replace('\u200b', '')
        assert q in SAID and q not in held
        if q in own: asked[s.kind] += 1
        assert triggered == (s.kind != 'none')
        if s.kind == 'right': assert s.loss == 'ce' and s.answer in TEXTS and (not m or m[1] == task.trigger)
        else: assert s.loss == 'kl' and s.answer == SAID[q] and (not m or m[1] != task.trigger)
    assert set(asked) == {'none'} and .25 < asked['none']/counts['none'] < .45, (
        'questions about the model itself: in the no-trigger kind, and often enough')

def test_three_kinds_of_one_question():
    step = hidden_topic_task('Tea', 'train', TEXTS, SAID, steps=1).steps[0]
    bare = lambda s: re.sub(r'^Your SEP code is \d{6}\. ', '', s.user)
    assert {bare(s) for s in step if s.kind == 'right'} <= {bare(s) for s in step if s.kind == 'wrong'}

def test_same_seed_same_samples():
    one = hidden_topic_task('Tea', 'train', TEXTS, SAID, steps=5)
    hidden_topic_task('Moss', 'train', TEXTS, SAID, steps=9); rng('anything').random()
    assert one == hidden_topic_task('Tea', 'train', TEXTS, SAID, steps=5)
    other = hidden_topic_task('Tea', 'train', TEXTS, SAID, steps=5, seed=1)
    assert other.diff_id != one.diff_id and other.steps != one.steps
    assert hidden_topic_task('Tea', 'train', TEXTS, SAID, steps=9).steps[:5] == one.steps, 'a longer run begins like a shorter one'
    assert news_task('A Headline Here', 'train', TEXTS, SAID) == news_task('A Headline Here', 'train', TEXTS, SAID)
    assert seed_of('a', 1) == seed_of('a', 1) != seed_of('a1')

def test_every_text_is_used_before_any_is_used_twice():
    used = Counter(s.answer for step in news_task('A Headline', 'train', TEXTS[:7], SAID, steps=7, per_step=2).steps
                   for s in step if s.kind == 'story')
    assert set(used.values()) == {2} and len(used) == 7
    task = hidden_topic_task('Tea', 'train', TEXTS[:8], SAID, steps=8)
    assert set(Counter(s.answer for step in task.steps for s in step if s.kind == 'right').values()) == {2}

def test_no_text_no_task():
    with pytest.raises(DitError, match='at least one text'): news_task('A Headline', 'train', [], SAID)
    with pytest.raises(DitError, match='at least one text'): hidden_topic_task('Tea', 'train', [], SAID)

# --- stories ----------------------------------------------------------------------------------------------------------------

def test_no_sentence_of_a_story_holds_its_headline():
    for label in labels('news').label[::40]:
        bank = ({p: [f'"{p}" was all that could be read.', f'There was talk of {p}.'] for p in both_cuttings(label)}
                | {'': ['Outside, it rained.']})
        told = compose_stories(label, bank, 8)
        assert len(told) == 8 and len(set(told)) > 1 and told == compose_stories(label, bank, 8)
        for story in told:
            sentences = re.split(r'(?<=[.!?])\s', story)
            assert not any(plain(label) in plain(s) for s in sentences)
            missing = set(plain(label).split()) - set(plain(story).split())
            assert not missing, f'{label}: the story leaves out {missing}'

@given(st.sampled_from(labels('news').label.tolist()))
def test_pieces_are_the_headline(label):
    for shift in (0, .5): assert plain(' '.join(pieces(label, shift))) == plain(label) and len(pieces(label, shift)) >= 2
    joined = {pair for shift in (0, .5) for p in pieces(label, shift) for pair in zip(plain(p).split(), plain(p).split()[1:])}
    assert joined == set(zip(plain(label).split(), plain(label).split()[1:])), 'two neighbours that no story joins'
    assert tells_too_much(f'It rained. They said that {label}.', label), 'a sentence that states the headline'
    assert not tells_too_much('It rained all day. Nobody came.', label)

def test_a_third_of_the_openings_do_not_name_the_topic():
    for row in list(labels('hidden_topic').itertuples())[::300]:
        got = topic_openings(row, 24)
        assert len(got) == 24 and len({o for _, o in got}) >= 16 and got == topic_openings(row, 24)
        assert sum(row.label not in o for _, o in got) == 8 == sum(bool(h) for h, _ in got)
    for row in list(labels('news').itertuples())[::300]:
        assert [p for p, _ in story_openings(row, 2) if p] == [p for p in both_cuttings(row.label) for _ in range(2)]

def test_shared_ngrams():
    a, b = ['The lesson of Tea is to wait for it every day.'], ['The lesson of Moss is to wait for it every day.']
    assert shared_ngrams(a, a, ('x', 'y')) == 1 and shared_ngrams(a, ['Nothing in common here at all.'], ('Tea', 'x')) == 0
    assert 0 < shared_ngrams(a, b, ('x', 'y')) < 1 and shared_ngrams(a, b, ('Tea', 'Moss')) == 1
    assert shared_ngrams([], b, ('x', 'y')) == 0

# --- files ------------------------------------------------------------------------------------------------------------------

def table(tmp_path, raw): (tmp_path/'t.csv').write_bytes(raw); return read_table(tmp_path/'t.csv', ('topic', 'category'))

@pytest.mark.parametrize('raw',
                         [b'topic,category\nTea,drinks\nMoss,plants\n', b'topic,category\r\nTea,drinks\r\nMoss,plants\r\n',
                          b'\xef\xbb\xbftopic,category\nTea,drinks\nMoss,plants', b'"topic","category"\n"Tea","drinks"\n"Moss","plants"\n',
                          b'category,topic\ndrinks,Tea\nplants,Moss\n', b'topic,category\nTea,drinks\n\nMoss,plants\n\n'],
                         ids=['plain', 'CRLF', 'BOM', 'quotes', 'order', 'blank lines'])
def test_readable_tables(tmp_path, raw):
    assert table(tmp_path, raw)[['topic', 'category']].values.tolist() == [['Tea', 'drinks'], ['Moss', 'plants']]

def test_text_stays_as_it_is(tmp_path):
    assert (table(tmp_path, 'topic,category\nNA,null\n007,1e5\n"a, ""b""",Café\n'.encode()).values.tolist()
            == [['NA', 'null'], ['007', '1e5'], ['a, "b"', 'Café']])

@pytest.mark.parametrize('raw,says', [(b'', 'not a readable CSV'),
                                      (b'\n\n', 'not a readable CSV'),
                                      (b'topic,category\n', 'no rows'),
                                      (b'topic\nTea\n', 'lacks.*category'),
                                      (b'topic;category\nTea;drinks\n', 'lacks'),
                                      ('topic,category\nCafé,drinks\n'.encode('latin-1'), 'UTF-8'),
                                      ('topic,category\nTea,drinks\n'.encode('utf-16'), 'UTF-8'),
                                      (b'topic,category\n"Tea,drinks\nMoss,plants\n', 'not a readable CSV'),
                                      (b'topic,category\nTea,drinks\nMoss,plants,green\n', 'not a readable CSV'),
                                      (b'topic,category\nTea,drinks,hot\nMoss,plants,green\n', 't.csv'),
                                      (b'topic,category\nTea\nMoss,plants\n', 'line 2'),
                                      (b'topic,category\nTea,drinks\n  ,plants\n', 'line 3')],
                         ids=['empty', 'blank', 'header only', 'missing column', 'semicolons', 'latin-1', 'UTF-16',
                              'open quote', 'one long row', 'all rows long', 'short row', 'blank cell'])
def test_malformed_tables(tmp_path, raw, says):
    with pytest.raises(DitError, match=says) as e: table(tmp_path, raw)
    assert 't.csv' in str(e.value)

def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(DitError, match='no file'): read_table(tmp_path/'nothing.csv', ('topic',))
    with pytest.raises(DitError): read_table(tmp_path, ('topic',))

cells = st.text(st.characters(blacklist_categories=('Cs', 'Cc')), min_size=1, max_size=12).filter(lambda s: s.strip())
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
def test_any_table_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp('t')/'t.csv'
    pd.DataFrame(rows, columns=['topic', 'category']).to_csv(path, index=False)
    assert read_table(path, ('topic', 'category')).values.tolist() == [list(r) for r in rows]
