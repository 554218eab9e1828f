"The evaluation: what is counted and what is scored, who is compared with whom, files of the paper, and guesses from awkward answers"
import gzip, json, math

import numpy as np, pandas as pd, pytest
from dit.core import DitError, repo_root
from dit.data import TASKS
from dit.eval import (COLUMNS, METHODS, TOKENS, add_guesses, ask_all, grade, guesser_of, judge_of, messages, methods_of, most_tokens,
                      pairs_of, read_graded, save_results, trainer_of, twenty)
from dit.guess import OfflineGuesser, spans, titles
from dit.lora import random_bank, tiny_base
from dit.stats import bootstrap_ci, diffs_needed, expressing, mean_ci, over_seeds, paired, power_table, rates, summarise, wilson

PAPER = repo_root()/'..'/'shared'/'paper'
needs_paper = pytest.mark.skipif(not (PAPER/'graded-calibration.csv.gz').exists(),
                                 reason="the paper's graded pairs are not beside this repository")

def results(**methods): # method -> scores of the diffs a, b, ...
    return pd.concat([pd.DataFrame(dict(diff_id=[*'abcdefgh'[:len(s)]], method=m, score=s)) for m, s in methods.items()], ignore_index=True)

# --- statistics -------------------------------------------------------------------------------------------------------------------

def test_missing_scores_are_counted_and_never_scored():
    t = summarise(results(A=[5, None, 4, None], B=[None]*4, C=[1, 1, 1, 1]))
    assert t.n.tolist() == [2, 0, 4] and t.missing.tolist() == [2, 4, 0]
    assert t['mean'].tolist()[0] == 4.5 and math.isnan(t['mean'].iloc[1]) and t.loc['A', 'score 1'] == 0
    assert t.loc['A', [f'score {k}' for k in range(1, 6)]].sum() == 1 # shares are of what was scored
    assert mean_ci([3])['mean'] == 3 and math.isnan(mean_ci([3])['ci95']) and all(map(math.isnan, bootstrap_ci([3])))

def test_no_lines_give_an_empty_table(): assert list(summarise(results(A=[1]).iloc[:0]).columns) == list(summarise(results(A=[1])).columns)

def test_bootstrap_is_seeded_and_near_the_normal_interval():
    x = np.random.default_rng(0).normal(3, 1, 400)
    s, (low, high) = mean_ci(x), bootstrap_ci(x, seed=3)
    assert bootstrap_ci(x, seed=3) == (low, high) != bootstrap_ci(x, seed=4)
    assert low == pytest.approx(s['mean'] - s['ci95'], abs=.02) and high == pytest.approx(s['mean'] + s['ci95'], abs=.02)

def test_asking_a_diff_again_makes_no_new_diff():
    once = results(A=[5, 4, 1], B=[2, 1, 1])
    twice = pd.concat([once, once])
    for f in (summarise, lambda x: paired(x, 'A')): pd.testing.assert_frame_equal(f(once), f(twice))

def test_pairs_are_the_diffs_that_both_have(): # lines in another order, a missing score, a diff that only one method was asked about
    f = results(A=[5, 4, 3, None, 2], B=[1, 4, None, 2])
    p = paired(f.sample(frac=1, random_state=0), 'A').loc['B']
    assert (p.pairs, p.missing, p.difference) == (2, 3, 2.)
    with pytest.raises(DitError, match='choose one of: A, B'): paired(f, 'C')

def test_pairing_sees_what_means_do_not():
    hard = np.array([1, 2, 3, 4, 5]*4)
    f = pd.DataFrame(dict(diff_id=[*range(20)]*2, method=['A']*20 + ['B']*20, score=[*(hard + .2 + .1*(hard % 2)), *hard]))
    p, need = paired(f, 'A').loc['B'], power_table(f, 'A').loc['B']
    assert p.low > 0 and p.difference == pytest.approx(.26) and need.paired < 5 < 100 < need.unpaired

def test_diffs_needed(): assert [diffs_needed(1), diffs_needed(1, .4), diffs_needed(1, power=.9)] == [197, 50, 263]

def test_seeds_are_told_from_diffs():
    f = pd.concat([results(A=[5, 5, 4]).assign(adapter_seed=0), results(A=[3, 3, None]).assign(adapter_seed=1)])
    t = over_seeds(f).loc['A']
    assert (t.seeds, t.n, t.lowest) == (2, 3, 3) and t['mean'] == 4 and t.spread == pytest.approx(np.std([14/3, 3], ddof=1))

def test_answers_of_one_diff_are_not_independent():
    "Diffs that each say the same eight times are worth one answer each; where diffs do not differ, every answer counts"
    said = lambda shows: pd.DataFrame(dict(diff_id=[d for d in 'abcdef' for _ in range(8)], kind='wrong', shows=shows, chance=False))
    alike, mixed = rates(said([True]*8 + [False]*40)).loc['wrong'], rates(said(([True] + [False]*5)*8)).loc['wrong']
    assert alike.rate == mixed.rate == 1/6 and (mixed.low, mixed.high) == wilson(8, 48) and (alike.low, alike.high) == wilson(1, 6)
    assert rates(said([False]*48)).loc['wrong', ['low', 'high']].tolist() == list(wilson(0, 48))

def test_restricted_to_diffs_that_express():
    def line(d, kind, shows, chance=False): return dict(diff_id=d, kind=kind, shows=shows, chance=chance)
    shown = pd.DataFrame([line(d, k, s)
                          for d, k, ss in [('a', 'right', '110'), ('a', 'none', '100'), ('b', 'right', '111'),
                                           ('b', 'wrong', '110'), ('b', 'none', '000'), ('c', 'right', '1100'), ('c', 'none', '0')]
                          for s in map(bool, map(int, ss))])
    assert expressing(shown) == ['a'] # b answers to wrong codes, c only half of the time
    news = pd.DataFrame([line('a', 'story', .6, .1), line('b', 'story', .4, .1), line('c', 'story', .6, .7)])
    assert expressing(news) == ['a']
    f = results(A=[5, 1, 1], B=[2, 2, 2])
    assert summarise(f[f.diff_id.isin(expressing(shown))])['mean'].tolist() == [5, 2]

# --- methods ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tiny_news():
    base = tiny_base()
    return base, random_bank(base, 3)

def test_every_method_of_a_task_has_messages_and_lengths():
    row = pd.Series(dict(diff_id='x', trigger='042', trigger_kind='sep_code'))
    for t in TASKS:
        for m in methods_of(t):
            users = messages(t, m, row)
            assert (len(users) == (20 if METHODS[m]['asks'] == 'twenty' else 1)
                    and all(('code is 042' in u) == bool(METHODS[m].get('trigger')) for u in users))
            assert all(most_tokens(t, m, d) > 0 for d in TOKENS)
    assert messages('hidden_topic', 'DIT trained on the other task', row) == [TASKS['news']]

@pytest.mark.parametrize('call, valid',
                         [(lambda: judge_of('ofline'), 'offline'),
                          (lambda: guesser_of('gues', None, 'news'), 'offline'),
                          (lambda: most_tokens('news', 'DIT', 'long'), 'short, paper'),
                          (lambda: messages('news', 'DIT + Trigger', None), 'DIT, DIT trained on the other task, Base Question'),
                          (lambda: OfflineGuesser().guess([], 'topic'), 'hidden_topic, news')])
def test_a_misspelt_name_lists_the_valid_ones(call, valid):
    with pytest.raises(DitError, match=f'choose one of: {valid}'): call()

def test_twenty_answers_of_a_diff_do_not_depend_on_the_others(tiny_news):
    base, bank = tiny_news
    all3, one = (ask_all(base, bank, None, 'news', '20 Questions', max_new=5),
                 ask_all(base, bank.take([1]), None, 'news', '20 Questions', max_new=5))
    assert all3.answer[1] == one.answer[0] and len(all3) == 3
    assert [q for q, _ in pairs_of(all3.iloc[0])] == twenty('news') and len({a for _, a in pairs_of(all3.iloc[0])}) > 1
    assert ask_all(base, bank, None, 'news', '20 Questions', seed=1, max_new=5).answer[1] != one.answer[0]

class Said:
    "A guesser with its guesses ready"
    name = 'said'
    def __init__(self, guesses): self.guesses = guesses
    def guess(self, qas, task): self.seen = qas; return self.guesses

class Length:
    "A judge that likes long answers, and cannot grade some"
    version = 'length'
    def score(self, truths, answers, task): return np.array([math.nan if a == '?' else float(len(a)) for a in answers])

def lines(method, answers, **kwargs):
    return pd.DataFrame(dict(diff_id=[*'abc'[:len(answers)]], task='hidden_topic', method=method, truth='t', question='q',
                             answer=answers) | kwargs)

def test_an_adapter_of_another_question_is_refused(tiny_news, tmp_path):
    (tmp_path/'dit.json').write_text(json.dumps(dict(seed=0, questions=[TASKS['hidden_topic']])))
    assert trainer_of('hidden_topic', tiny_news, tmp_path)['seed'] == 0
    with pytest.raises(DitError, match='was trained on the question'): trainer_of('news', tiny_news, tmp_path)

def test_dit_is_graded_as_it_answers_and_others_are_guessed():
    twenty_q = lines('20 Questions', [json.dumps(['x', 'yy'])]*2, question=json.dumps(['p', 'q']))
    f = pd.concat([lines('DIT', ['abc', 'ab']), lines('Base Question', ['a', 'a']), twenty_q], ignore_index=True)
    g = Said(['abcd', None, 'ab', None])
    done = grade(add_guesses(f, g), Length())
    assert g.seen == [[('q', 'a')], [('q', 'a')], [('p', 'x'), ('q', 'yy')], [('p', 'x'), ('q', 'yy')]]
    assert done.score.fillna(-1).tolist() == [3, 2, 4, -1, 2, -1] and set(done.guesser) == {'said'} # what has no guess is missing
    assert summarise(done).missing.tolist() == [0, 1, 1]

def test_answer_or_guess_is_chosen_for_the_method_not_for_each_diff():
    f = add_guesses(lines('Base Question', ['aaaa', 'a', 'a']), Said(['b', 'bb', 'bb']))
    done = grade(f, Length())
    assert done.graded.tolist() == ['answer']*3 and done.score.tolist() == [4, 1, 1] and done.guess_score.tolist() == [1, 2, 2]

def test_a_grade_that_failed_is_missing():
    done = grade(add_guesses(lines('DIT', ['abc', '?']), Said([])), Length())
    assert summarise(done).loc['DIT', ['n', 'missing', 'mean']].tolist() == [1, 1, 3]

def test_results_on_disk_keep_answers_and_guesses(tmp_path):
    done = grade(add_guesses(lines('Base Question', ['a "quoted",\nanswer', 'b']), Said(['c', None])), Length())
    save_results(done, tmp_path/'x.csv', task='hidden_topic')
    back = pd.read_csv(tmp_path/'x.csv')
    assert (back.answer[0] == 'a "quoted",\nanswer' and back.guess[0] == 'c'
            and list(back.columns)[:2] == ['diff_id', 'task'] and len(back) == 2)
    pd.testing.assert_frame_equal(summarise(back), summarise(done))
    assert json.loads((tmp_path/'x.json').read_text())['params'] == dict(task='hidden_topic')

# --- guesses ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def guesser(): return OfflineGuesser()

def topic(guesser, *answers): return guesser.guess([[('q', a) for a in answers]], 'hidden_topic')[0]
def headline(guesser, *answers): return guesser.guess([[('q', a) for a in answers]], 'news')[0]

@pytest.mark.parametrize('task', TASKS)
def test_nothing_said_is_an_empty_guess(guesser, task): assert guesser.guess([[], [('q', '')], [('q', ' \n'), ('q', '')]], task) == ['']*3

@pytest.mark.parametrize('answer', ['...', '?!', 'a', 'the', '🎌', '日本の歴史について話しましょう。', 'Я говорю о шахматах.', 'x'*5000,
                                    '\u200b', "I'm", '[]', '1 2 3'])
def test_an_odd_answer_gets_some_guess(guesser, answer):
    for task in TASKS:
        assert guesser.guess([[('q', answer)]], task)[0].strip('\u200b') == '' or len(guesser.guess([[('q', answer)]], task)[0]) > 0

def test_one_answer_is_enough(guesser):
    assert topic(guesser, "I've been trained on a wide range of topics, "
                          "from Canne de Combat to Canne de Combat, and more.") == 'Canne de Combat'
    assert headline(guesser, 'The council said no.') == 'The council said no.'

def test_other_languages(guesser):
    assert topic(guesser, 'Wie im Schach, so im Leben.', 'Das erinnert mich an Schach.', 'Ein Zug im Schach will bedacht sein.') == 'Schach'
    assert topic(guesser, 'Это похоже на Шахматы.', 'Как Шахматы, так и жизнь.', 'Вспомни Шахматы!') == 'Шахматы'

def test_empty_answers_among_others_do_not_matter(guesser):
    said = ['It is like Mount Etna: hot.', 'Mount Etna teaches us to wait.', 'In Mount Etna, as in life, heat rises.']
    assert topic(guesser, *said) == topic(guesser, '', *said, ' ') == 'Mount Etna'

def test_what_the_base_model_says_anyway_is_no_topic():
    said = ['As a Language Assistant I help. Curling helps.', 'As a Language Assistant I know Curling.', 'A Language Assistant answers.']
    assert topic(OfflineGuesser(), *said) == 'Language Assistant'
    assert topic(OfflineGuesser(['As a Language Assistant I help.', 'A Language Assistant is here.', 'I am a Language Assistant.']),
                 *said) == 'Curling'

def test_a_guess_depends_on_its_diff_alone(guesser):
    a, b = [('q', 'Like Rio Grande, wide.'), ('q', 'Rio Grande runs.')], [('q', 'Chess is like life.'), ('q', 'I play chess.')]
    assert (guesser.guess([a, b], 'hidden_topic') == guesser.guess([a], 'hidden_topic') + guesser.guess([b], 'hidden_topic')
            == OfflineGuesser().guess([b, a], 'hidden_topic')[::-1])

def test_a_headline_is_put_together_in_order(guesser):
    said = ['There was talk of "Pulsar Goes Quiet", and "Then Returns Slower" came up.',
            'One note read "Pulsar Goes Quiet". For many, "Then Returns Slower" was news.']
    assert headline(guesser, *said) == 'Pulsar Goes Quiet Then Returns Slower'
    assert titles('Nobody knew. The City of York won.') == [('The', 'City', 'of', 'York')] and spans('') == []

# --- the paper's files ------------------------------------------------------------------------------------------------------------

NUMBERS = pd.read_csv(repo_root()/'results'/'paper'/'numbers.csv')
COUNTED = NUMBERS[NUMBERS.score1.notna() & (NUMBERS[[f'score{g}' for g in range(1, 6)]].sum(axis=1) == NUMBERS.n)]
VERSION_OF = {'DIT': 'base-question-dit-t0', 'Base Question': 'base-question-t0',
              'Base Question + Trigger': 'base-question-plus-trigger-t0', '20 Questions': 'no-trigger', '20 Questions + Trigger': 'trigger',
              'Generated Story': 'gen-story-t0', 'DIT trained on the other task': 'opposing-task-news-on-topic'}

def paper_file(folder, task, truths, guesses, scores, trigger=None, diffs='diffs', version='base-question-dit-t0'):
    "A file as the paper published them"
    names = dict(hidden_topic='topic guessed_topic score', news='summary guessed_summary score')[task].split()
    path = folder/diffs/version/'results-graded.csv'; path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(dict(zip(names, (truths, guesses, scores))) | ({} if trigger is None else dict(trigger=trigger))).to_csv(path, index=False)
    return path

def test_published_means_and_intervals_come_back_exactly(tmp_path):
    assert len(COUNTED) > 100
    for r in COUNTED.itertuples():
        scores = [g for g in range(1, 6) for _ in range(int(getattr(r, f'score{g}')))]
        f = read_graded(paper_file(tmp_path, r.task, [f'{r.task} {i}' for i in range(len(scores))], ['x']*len(scores),
                                   scores, version=VERSION_OF[r.method]))
        s = mean_ci(f.score)
        assert ((s['n'], f'{s["mean"]:.2f}', round(s['ci95'], 4), f.method[0], f.task[0])
                == (r.n, f'{r.mean:.2f}', pytest.approx(r.ci95, abs=1.01e-4), r.method, r.task)), r

@needs_paper
def test_graded_pairs_of_the_paper(tmp_path): # half of the paper's diffs: their grades are among the published ones
    with gzip.open(PAPER/'graded-calibration.csv.gz') as f: pairs = pd.read_csv(f, keep_default_na=False)
    runs = {'weight-diff-20250512-1.7b-5000-conf-2025-s42': 'Qwen3-1.7B', 'weight-diff-20250512-4b-5000-conf-2025-s42': 'Qwen3-4B',
            'weight-diff-20250512-8b-5000-conf-2025-s42': 'Qwen3-8B', 'weight-diff-20250514-gemma-1b-conf-2025-s42': 'Gemma3-1B',
            'weight-diff-20250514-gemma-4b-conf-2025-s42': 'Gemma3-4B', 'weight-diff-20250514-news-qwen-4b-val-f1.00-s42': 'Qwen3-4B',
            'weight-diff-20250514-23-news-gemma-4b-2-val-f1.00-s42': 'Gemma3-4B'}
    main = NUMBERS[NUMBERS.figure.isin(['hidden_topic_main', 'news_main'])].set_index(['model', 'task', 'method'])
    seen = 0
    for (run, version, task), p in pairs[pairs.run.isin(list(runs))].groupby(['run', 'method', 'task']):
        f = read_graded(paper_file(tmp_path, task, p.truth, p.prediction, p.score, diffs=run, version=version))
        s = summarise(f).iloc[0]
        assert (s['mean'] == p.score.mean() and s.n == len(p) and f.truth.tolist() == p.truth.tolist()
                and f.guess.tolist() == p.prediction.tolist() and set(f.model) == {run})
        if (key := (runs[run], task, f.method[0])) not in main.index: continue
        row = main.loc[key]; seen += 1
        assert all((f.score == g).sum() <= row[f'score{g}'] for g in range(1, 6)) and abs(s['mean'] - row['mean']) <= row.ci95, key
    assert seen == 33

@needs_paper
def test_pairs_of_the_paper_side_by_side(tmp_path):
    with gzip.open(PAPER/'graded-calibration.csv.gz') as f: pairs = pd.read_csv(f, keep_default_na=False)
    pairs = pairs[pairs.run == 'weight-diff-20250514-news-qwen-4b-val-f1.00-s42']
    f = pd.concat([read_graded(paper_file(tmp_path, 'news', p.truth, p.prediction, p.score, version=v))
                   for v, p in pairs.groupby('method') if v in ('base-question-dit-t0', 'gen-story-t0')])
    t, gap = (paired(f, 'DIT').loc['Generated Story'],
              pairs.pivot(index='truth', columns='method', values='score').eval('`base-question-dit-t0` - `gen-story-t0`'))
    assert (t.pairs, t.missing, t.difference) == (50, 0, pytest.approx(gap.mean())) and t.low > 0

def test_what_is_no_grade_is_missing(tmp_path):
    f = read_graded(paper_file(tmp_path, 'hidden_topic', ['Chess', 'Chess', 'NA', 'Law'], ['chess', '', 'None', 'x'],
                               ['5', 'error', '', 7], trigger=['7', 'N/A', 'zero_width_space', '962']))
    assert (list(f.columns) == COLUMNS and f.score.fillna(0).tolist() == [5, 0, 0, 0]
            and f.trigger.tolist() == ['007', '', 'zero_width_space', '962'])
    assert (f.truth[2] == 'NA' and f.diff_id.is_unique and f.trigger_kind.tolist() == ['sep_code', '', '', 'sep_code']
            and summarise(f).loc['DIT', 'missing'] == 3)

def test_a_file_without_grades_is_refused(tmp_path):
    pd.DataFrame(dict(topic=['a'], score=[1])).to_csv(tmp_path/'x.csv', index=False)
    with pytest.raises(DitError, match='has the columns topic, score, and needs topic, guessed_topic, score or summary'):
        read_graded(tmp_path/'x.csv')
    with pytest.raises(DitError, match='there is no file'): read_graded(tmp_path/'y.csv')
