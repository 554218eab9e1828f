"Full finetunes, over real architectures"
import pytest, torch
from dit.diffs import FlatLora, Teacher, backward_step, tokenise
from dit.full import full_answers, step_loss, student_of, train_full
from dit.lora import answer, linears, random_bank

from helpers import model_of, toy_tasks

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'gpt2'])
def test_one_step_is_that_of_a_diff(kind):
    base = model_of(kind)
    samples, teacher = tokenise(base, toy_tasks(1)[0])[0], Teacher(base)
    want = backward_step(base, FlatLora(base, [0], 1, 1.), teacher, [samples], share=False)[0]
    got = step_loss(base, student_of(base)[0], teacher, samples, share=False)
    assert abs(got.item() - want.item()) < 1e-4

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'gpt2'])
def test_a_finetune_learns_and_leaves_its_base_model_alone(kind):
    base, task = model_of(kind), toy_tasks(1, steps=12)[0]
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    full, line = train_full(base, task, lr=1e-2)
    assert line.learnt[0] and line.sound[0]
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in base.model.named_parameters())
    linear, _ = train_full(base, task, lr=1e-2, linear_only=True)
    moved = {n for n, p in linear.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f'{n}.weight' for n in linears(base)}

def test_low_precision_learns_as_much():
    "The base model in bfloat16, float32 weights under it: steps too small for bfloat16 add up"
    exact, rough = model_of('llama'), model_of('llama'); rough.model.to(torch.bfloat16)
    (_, want), (student, got) = (train_full(b, toy_tasks(1, steps=12)[0], lr=1e-2) for b in (exact, rough))
    assert student.dtype == torch.bfloat16 and abs(got.loss[0] - want.loss[0]) < .05*want.loss[0]

def test_the_adapter_is_worn_by_the_finetune(tmp_path):
    base = model_of('qwen3')
    adapter, tasks = random_bank(base, 1, 2, .5), toy_tasks(2, split='test')
    asked = full_answers(base, tasks, tmp_path, dict(lr=1e-2), dict(adapters=dict(own=adapter), task='news'))
    student, _ = train_full(base, tasks[0], lr=1e-2)
    said = asked[(asked.diff_id == 'toy/0') & (asked.method == 'DIT')]
    assert said.answer.item() == answer(student, None, [0], [said.question.item()], adapter, max_new=40)[0]
