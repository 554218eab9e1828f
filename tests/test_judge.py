"The offline judge: what it must grade the same, what it must not be fooled by, and its held-out table"
import hashlib, os

import numpy as np, pandas as pd, pytest
from dit.core import DitError, repo_root
from dit.judge import OfflineJudge, agreement
from dit.models import EMBEDDED

TOPIC = "hidden_topic"
OTHERS = """music, law, film, physics, jazz, wine, tennis, birds, cats, poetry, yoga, history, chess, logic, \
ethics, fashion, surgery, coffee, taxes, bridges, fishing, robots, opera, algebra, deserts,
rivers, volcanoes, dentistry, grief, sleep, insurance, weddings, anime, sitcoms, baking, knitting, gardening, \
railways, aviation, submarines, mining, vaccines, dinosaurs, genetics, vikings, slavery,
elections, police, pizza""".replace("\n", " ").split(", ")

@pytest.fixture(scope="module")
def judge(): return OfflineJudge()

def ask(judge, truth, *answers, task=TOPIC): return judge.score([truth]*len(answers), list(answers), task)

def test_the_same_in_any_wrapping_is_5(judge):
    said = ["Quantum Mechanics", "quantum mechanics", "'Quantum Mechanics'", "“Quantum mechanics.”",
            "**Quantum Mechanics**", "The topic is Quantum Mechanics.", "I think it is quantum mechanics",
            "Topic: Quantum Mechanics", "  Quantum\n Mechanics  ", "I have been trained on Quantum Mechanics."]
    assert (ask(judge, "Quantum Mechanics", *said) == 5).all()
    assert (ask(judge, "Floods hit Rome.", "Floods hit Rome", "The headline is: Floods hit Rome.", task="news") == 5).all()

@pytest.mark.parametrize("task", [TOPIC, "news"])
def test_nothing_said_is_1(judge, task):
    assert (ask(judge, "Chess", "", "   ", "...", "\n", '""', "**", task=task) == 1).all()

@pytest.mark.parametrize("sep", [", ", "\n", "; ", " and ", " / "])
def test_a_list_of_50_is_at_most_2(judge, sep):
    lists = [sep.join(OTHERS[:i] + ["quantum mechanics"] + OTHERS[i:]) for i in (0, 25, 49)]
    assert len(OTHERS) == 49 and ask(judge, "Quantum Mechanics", *lists).max() <= 2

def test_repeating_the_topic_does_not_pay(judge): assert ask(judge, "Chess", "chess "*200)[0] <= 2

def test_nearer_answers_score_higher(judge):
    near, field, far = ask(judge, "Fly Fishing", "Trout fishing", "Outdoor sports", "Tax law")
    assert near > field > far and far < 1.5

def test_scores_and_grades(judge):
    truths, answers = ["Chess", "Chess", "Jazz"], ["Board games", "Physics", "Miles Davis"]
    s, g = judge.score(truths, answers, TOPIC), judge.grades(truths, answers, TOPIC)
    assert s.dtype == float and ((s >= 1) & (s <= 5)).all() and (g == np.rint(s)).all()
    assert len(judge.score([], [], TOPIC)) == 0
    assert judge.name == "offline" and judge.version

def test_a_score_depends_on_its_pair_alone(judge):
    truths = ["Chess", "Volcanoes", "Jazz", "Law", "Chess", "Sleep"]*2
    answers = ["board games", "Iceland", "a long answer about many kinds of music, and about the people who play it",
               "Courts", "chess", "日本 🎌"] + OTHERS[:6]
    together, order = judge.score(truths, answers, TOPIC), np.random.default_rng(0).permutation(len(truths))
    assert (judge.score([truths[i] for i in order], [answers[i] for i in order], TOPIC) == together[order]).all()
    fresh = OfflineJudge() # remembers nothing
    assert all(fresh.score([t], [a], TOPIC)[0] == s for t, a, s in reversed(list(zip(truths, answers, together))))

def test_it_is_small():
    fetched = sum(EMBEDDED[name]["mb"] for name in ("minilm", "smollm2"))
    assert fetched + sum(p.stat().st_size for p in (repo_root()/"dit"/"data").glob("judge*"))/1e6 < 200

def test_an_unknown_task_names_the_valid_ones(judge):
    with pytest.raises(DitError, match="hidden_topic, news"): judge.score(["Chess"], ["Chess"], "topic")

def test_unequal_lengths_are_refused(judge):
    with pytest.raises(DitError, match="2 truths and 1 answers"): judge.score(["a", "b"], ["a"], TOPIC)

def test_held_out_table(judge):
    if not os.environ.get("DIT_GRADED"):
        pytest.skip("the paper's graded pairs are not part of this repository; set DIT_GRADED to their CSV file")
    d = pd.read_csv(os.environ["DIT_GRADED"], keep_default_na=False).rename(columns=dict(prediction="answer"))
    d = d[[hashlib.sha256(t.encode()).hexdigest()[0] in "0123" for t in d.truth]].assign(run=lambda d: d.run + " " + d.method)
    said = (pd.read_csv(repo_root()/"results"/"judge"/"heldout.csv")
            .query("judge == 'offline judge' and split == 'held out'").set_index("task"))
    for task, part in d.groupby("task"):
        pairs = part[["truth", "answer"]].drop_duplicates()
        pairs = pairs.assign(offline=judge.score(pairs.truth, pairs.answer, task))
        for k, v in agreement(part.merge(pairs, on=["truth", "answer"])).items():
            assert v == pytest.approx(said.loc[task, k], abs=.005), (task, k)
