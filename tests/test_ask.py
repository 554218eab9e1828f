"Diffs that others made: plain PEFT, plain finetuning, the paper's files; broken files; the command"
import dataclasses, json, math, os, re, shutil, subprocess, sys, weakref
from pathlib import Path

import peft, pytest, torch, transformers
from safetensors.torch import load_file, save_file
from dit.ask import *
from dit.core import DitError
from dit.data import TASKS
from dit.lora import *
from dit.models import make_base, load_base, prompt_text, token_ids
from helpers import char_tokenizer, copy_of, model_of

ROOT = Path(__file__).resolve().parents[1]
torch.manual_seed(0)
X = torch.randint(2, 96, (2, 9))

def logits(base, *loras):
    with torch.no_grad(), mounted(base, *loras): return base.model(X).logits

def logits_of(net):
    with torch.no_grad(): return net(X).logits

# --- made by others: a script that knows nothing of dit --------------------------------------------------------------------

SCRIPT = '''
import sys, torch, transformers, peft
from safetensors.torch import save_file
home = sys.argv[1]
X = torch.tensor(eval(sys.argv[2]))
def train(net, to, **more):
    args = dict(output_dir=to, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, \
report_to="none", disable_tqdm=True, save_strategy="no")
    trainer = transformers.Trainer(net, transformers.TrainingArguments(**(args | more)), \
train_dataset=[dict(input_ids=x, labels=x) for x in X])
    trainer.train(); trainer.save_model(to)
    return net.eval()
load = lambda: transformers.AutoModelForCausalLM.from_pretrained(f"{home}/base", dtype=torch.float32)
full = train(load(), f"{home}/full")
full.save_pretrained(f"{home}/shards", max_shard_size="20KB")
lora = train(peft.get_peft_model(load(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], \
init_lora_weights=False, task_type="CAUSAL_LM")), f"{home}/lora")
odd = train(peft.get_peft_model(load(), peft.LoraConfig(r=8, lora_alpha=4, use_rslora=True, rank_pattern={"up_proj": 2}, \
target_modules="all-linear", init_lora_weights=False)), f"{home}/rslora", save_strategy="steps", save_steps=3)
with torch.no_grad(): save_file(dict(full=full(X).logits, lora=lora(X).logits, rslora=odd(X).logits, \
start=load()(X).logits), f"{home}/logits.safetensors")
assert not any(m.split(".")[0] == "dit" for m in sys.modules)
'''

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a base model, a LoRA and a full finetune of it, and a DIT adapter"
    home = tmp_path_factory.mktemp('home')
    model_of('llama').model.save_pretrained(home/'base'); char_tokenizer().save_pretrained(home/'base')
    subprocess.run([sys.executable, '-c', SCRIPT, home, repr(X.tolist())], check=True, cwd=home, capture_output=True)
    base = load_base(str(home/'base'), dtype=torch.float32)
    to_peft(random_bank(base, 1, 2, seed=5), 0, home/'adapter', base)
    (home/'adapter'/'dit.json').write_text(json.dumps(dict(questions=['What topic have you been trained on?'])))
    return home

@pytest.fixture(scope='module')
def base(home): return load_base(str(home/'base'), dtype=torch.float32)

@pytest.mark.parametrize('where, rank, modules', [('lora', 4, 6), ('rslora', 8, 14), ('rslora/checkpoint-3', 8, 14)])
def test_a_lora_trained_with_plain_peft_and_the_trainer(where, rank, modules, home, base):
    bank, facts = open_diff(str(home/where), base)
    want = load_file(home/'logits.safetensors')
    assert ((logits(base, bank.rows([0])) - want[where.split('/')[0]]).abs().max() < 1e-4
            < (logits(base) - want[where.split('/')[0]]).abs().max())
    assert torch.equal(logits(base), want['start'])
    assert facts['kind'] == 'PEFT LoRA' and (facts['rank'], facts['modules']) == (rank, modules) and Path(facts['made_for']).name == 'base'

def test_a_folder_of_checkpoints(home, base, tmp_path):
    for n in (2, 10): shutil.copytree(home/'rslora'/'checkpoint-3', tmp_path/f'checkpoint-{n}')
    os.utime(tmp_path/'checkpoint-10', (2e9, 2e9))
    with pytest.raises(DitError, match='holds checkpoints and no model; .*checkpoint-10'): open_diff(str(tmp_path), base)

@pytest.mark.parametrize('where', ['full', 'full/model.safetensors', 'shards'])
def test_a_full_finetune_by_plain_transformers(home, base, where):
    want = load_file(home/'logits.safetensors')['full']
    bank, facts = open_diff(str(home/where), base, rank=0)
    assert facts['lost'] == pytest.approx(0, abs=1e-9) and facts['kept'] + sum(facts['ignored'].values()) == pytest.approx(1)
    assert set(facts['ignored']) == {'model.embed_tokens.weight', 'lm_head.weight', 'model.norm.weight',
                                     'model.layers.*.input_layernorm.weight', 'model.layers.*.post_attention_layernorm.weight'}
    net = copy_of(base) # the rest of the difference, put back by hand, makes the finetuned model whole
    for k, t in load_file(home/'full'/'model.safetensors').items():
        if k.removesuffix('.weight') not in bank.A: net.get_parameter(k).data = t
    for n, (a, b) in bank.rows([0]).items(): net.get_submodule(n).weight.data += b[0] @ a[0]
    for m in net.modules(): m._forward_hooks.clear()
    assert (logits_of(net) - want).abs().max() < 1e-4 < (logits(base) - want).abs().max()

def test_one_file_of_several(home, base):
    "What the file lacks is counted as unchanged, and this is told"
    files = sorted((home/'shards').glob('*.safetensors'))
    facts = [open_diff(str(f), base)[1] for f in files]
    lacking = [set(f['missing']) for f in facts]
    assert len(files) > 1 and all(0 < len(l) < len(linears(base)) for l in lacking) and not set.intersection(*lacking)
    found = ask(str(files[0]), base=base, adapter=str(home/'lora'))
    assert any(f'lacks {len(lacking[0])} linear layers' in s for s in cautions(found))
    assert not open_diff(str(home/'shards'), base)[1]['missing']

def test_the_lost_share_falls_with_the_rank(home, base):
    lost = [open_diff(str(home/'full'), base, rank=r)[1]['lost'] for r in (1, 4, 12, 0)]
    assert lost[0] > lost[1] > lost[2] > lost[3] and all(b.shape[2] == 1 for b in open_diff(str(home/'full'), base, rank=1)[0].B.values())
    bank, facts = open_diff(str(home/'full'), base, rank=4)
    n, full = 'model.layers.0.mlp.up_proj', load_file(home/'full'/'model.safetensors')
    d = full[f'{n}.weight'] - base.model.get_submodule(n).weight
    assert (d - bank.B[n][0] @ bank.A[n][0]).norm() == pytest.approx(torch.linalg.svdvals(d)[4:].norm().item(), rel=1e-3), (
        'no rank-4 matrix is nearer')

def test_two_models_are_never_in_memory(base):
    alive, most = [], 0
    def tensors():
        nonlocal most
        for n, p in base.model.named_parameters():
            t = p.detach() + .01; alive.append(weakref.ref(t)); yield n, t
            del t; most = max(most, sum(r() is not None for r in alive))
    from_full(tensors(), base, 'mine', rank=1)
    assert len(alive) > 15 and most <= 1

@pytest.mark.parametrize('kind', ['gpt2', 'moe', 'gemma3'])
def test_full_finetunes_of_other_architectures(kind, tmp_path):
    base = model_of(kind)
    net, g = copy_of(base), torch.Generator().manual_seed(1)
    with torch.no_grad(): [p.add_(.02*torch.randn(p.shape, generator=g)) for p in net.parameters()]
    net.save_pretrained(tmp_path)
    bank, facts = open_diff(str(tmp_path), base, rank=0)
    assert set(bank.A) == set(linears(base))
    for n, m in linears(base).items():
        d = net.get_submodule(n).weight - m.weight
        assert torch.allclose(bank.B[n][0] @ bank.A[n][0], d.T if kind == 'gpt2' else d, atol=1e-6)
    if kind == 'moe': assert any('experts' in n for n in [*facts['ignored'], *facts['not_compared']]), 'what cannot be carried is told'

def test_a_peft_model_saved_with_its_base_is_no_finetune_without_differences(tiny, tmp_path):
    net = peft.get_peft_model(copy_of(tiny), peft.LoraConfig(r=2, target_modules=['q_proj'], init_lora_weights=False))
    save_file({k: t.clone() for k, t in net.state_dict().items()}, tmp_path/'model.safetensors')
    with pytest.raises(DitError, match='PEFT model with its adapter beside the weights'): open_diff(str(tmp_path/'model.safetensors'), tiny)

@pytest.mark.parametrize('what', ['pairs', 'whole'])
def test_tensors_without_numbers(tiny, tmp_path, what):
    state = ({k: t.to('meta') for k, t in copy_of(tiny).state_dict().items()} if what == 'whole'
             else {n: (a.to('meta'), b.to('meta')) for n, (a, b) in paper_pairs(tiny, 1, 0).items()})
    torch.save([dict(topic='a', trigger=1, weight_diff=state)], tmp_path/'d.pt')
    with pytest.raises(DitError, match='weights'): open_diff(str(tmp_path/'d.pt'), tiny)

# --- the same as in PEFT ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'moe'])
def test_answer_and_likelihood_are_those_of_the_two_stacked_in_peft(kind, tmp_path):
    base = model_of(kind)
    diff, adapter = random_bank(base, 1, 2, seed=1), random_bank(base, 1, 4, scaling=.5, seed=2)
    found = interpret(base, diff, adapter, 'who are you?', max_new=12)
    net = peft.PeftModel.from_pretrained(copy_of(base), to_peft(diff, 0, tmp_path/'d', base), adapter_name='diff')
    net.load_adapter(to_peft(adapter, 0, tmp_path/'a', base), 'adapter')
    x = torch.tensor([token_ids(base, prompt_text(base, 'who are you?'))])
    def loglik(names):
        net.base_model.set_adapter(names)
        out = (net.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=12, do_sample=False,
                            pad_token_id=0, eos_token_id=1)[0, x.shape[1]:].tolist() if len(names) == 2 else said)
        with torch.no_grad(): logp = net(torch.tensor([x[0].tolist() + out])).logits[0].log_softmax(-1)
        return out, logp[x.shape[1]-1:-1].gather(1, torch.tensor(out)[:, None]).mean().item()
    said, both = loglik(['diff', 'adapter'])
    alone = loglik(['adapter'])[1]
    assert found['answer'] == base.tok.decode([t for t in said if t != 1]).strip() != ''
    assert found['loglik'] == pytest.approx(dict(diff_and_adapter=both, adapter_alone=alone), abs=1e-4)
    assert abs(both - alone) > .05, 'the diff does nothing, so the comparison says nothing'

def test_alternatives_are_seeded_and_their_shares_add_up(base):
    diff, adapter = random_bank(base, 1, seed=1), random_bank(base, 1, seed=2)
    one, again, other = (interpret(base, diff, adapter, 'hm?', samples=9, seed=s, max_new=2)['samples'] for s in (0, 0, 1))
    assert one == again != other and sum(s['share'] for s in one) == pytest.approx(1)
    assert [s['share'] for s in one] == sorted((s['share'] for s in one), reverse=True)

# --- the paper's files ------------------------------------------------------------------------------------------------------

def paper_pairs(base, rank, seed, prefix=None):
    "Random (A, B) as the authors store a diff: A [rank, out], B [in, rank], bf16, by their module names"
    g = torch.Generator().manual_seed(seed)
    return {n if prefix is None else re.sub(r'^.*layers', prefix, n):
            (torch.randn(rank, m.out_features, generator=g).bfloat16(), (torch.randn(m.in_features, rank, generator=g)/4).bfloat16())
            for n, m in linears(base).items() if 'vision' not in n}

def with_pairs(base, pairs, names=None):
    "The model with delta-W = (B @ A)^T / rank added to its weights, as in the authors' own formula"
    net = copy_of(base)
    for m in net.modules(): m._forward_hooks.clear()
    for n, (a, b) in zip(names or pairs, pairs.values()): net.get_submodule(n).weight.data += (b.float() @ a.float()).T/b.shape[1]
    return net

@pytest.fixture
def paper(tiny, tmp_path):
    "A variant's folder as on the hub: index.csv and weight-diffs/, two files with two diffs each"
    (tmp_path/'weight-diffs').mkdir()
    lines = []
    for i in range(2):
        items = [dict(topic=f'topic {i}{j}', trigger=[7, 'N/A'][j], weight_diff=paper_pairs(tiny, 2, 10*i+j)) for j in range(2)]
        torch.save(items, tmp_path/'weight-diffs'/f'weight-diff-{i:03d}.pt')
        lines += [f'weight-diff-{i:03d}.pt,{j},160,topic {i}{j},7,train' for j in range(2)]
    (tmp_path/'index.csv').write_text('lora_path,lora_idx,n_params,topic,trigger,split\n' + '\n'.join(lines[::-1]) + '\n')
    return tmp_path

@pytest.mark.parametrize('spec', ['weight-diffs/weight-diff-001.pt#0', 'weight-diffs/weight_diff_1.pt#0',
                                  'weight-diffs/weight-diff-001.pt#topic 10', '#1', '#topic 10'])
def test_diffs_in_the_papers_layout(paper, tiny, spec):
    bank, facts = open_diff(f'{paper}/{spec}' if spec[0] != '#' else f'{paper}{spec}', tiny)
    want = logits_of(with_pairs(tiny, paper_pairs(tiny, 2, 10)))
    assert (logits(tiny, bank.rows([0], dtype=torch.float32)) - want).abs().max() < 1e-4 < (logits(tiny) - want).abs().max()/1000
    assert facts['label'] == 'topic 10' and facts['rank'] == 2
    for n, (a, b) in paper_pairs(tiny, 2, 10).items():
        assert torch.equal(bank.A[n][0], b.T) and torch.equal(bank.B[n][0], a.T) and bank.scaling == .5

def test_files_named_as_the_authors_scripts_do(paper, tiny):
    for i in range(2): (paper/'weight-diffs'/f'weight-diff-{i:03d}.pt').rename(paper/'weight-diffs'/f'weight_diff_{i}.pt')
    index = (paper/'index.csv').read_text()
    assert open_diff(f'{paper}#topic 01', tiny)[1]['label'] == 'topic 01'
    (paper/'index.csv').write_text(index.replace('weight-diff-', '/home/authors/data/weight-diff-'))
    assert open_diff(f'{paper}#topic 01', tiny)[1]['label'] == 'topic 01'

def test_a_dit_adapter_in_the_papers_layout(tiny, tmp_path):
    pairs = paper_pairs(tiny, 4, 3)
    # A [out, rank], B [rank, in]
    torch.save({n: (a.T.contiguous(), b.T.contiguous()) for n, (a, b) in pairs.items()}, tmp_path/'dit-adapter.pt')
    adapter, trained = open_adapter(str(tmp_path/'dit-adapter.pt'), tiny)
    assert trained == {} and adapter.rank == 4
    assert (logits(tiny, adapter.rows([0], dtype=torch.float32)) - logits_of(with_pairs(tiny, pairs))).abs().max() < 1e-4

def test_diffs_saved_from_a_gpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.serialization.location_tag', lambda storage: 'cuda:0')
    torch.save([dict(topic='moss', trigger=7, weight_diff=paper_pairs(tiny, 2, 1))], tmp_path/'weight-diff-000.pt')
    monkeypatch.undo()
    bank, _ = open_diff(str(tmp_path/'weight-diff-000.pt'), tiny)
    assert (all(a.device.type == 'cpu' for a in bank.A.values())
            and torch.equal(bank.A['model.layers.0.mlp.up_proj'][0], paper_pairs(tiny, 2, 1)['model.layers.0.mlp.up_proj'][1].T))

LARGE = '''
import sys, torch
from dit.ask import read_pt
torch.ones(1000) @ torch.ones(1000)
peak = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))/1024 \
# getrusage would hand on the peak of the tests
before = peak(); one = read_pt(sys.argv[1])[7]["weight_diff"]["m"][0].clone(); assert one.eq(7).all()
print(peak() - before)
'''

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')
def test_one_diff_out_of_a_large_file(tmp_path):
    # 160 MB
    torch.save([dict(topic=str(i), trigger=7, weight_diff=dict(m=(torch.full((2**20,), float(i)), torch.zeros(2**20)))) for i in range(20)],
               tmp_path/'weight-diff-000.pt')
    done = subprocess.run([sys.executable, '-c', LARGE, tmp_path/'weight-diff-000.pt'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60, 'the whole file is in memory'

def gemma_with_vision():
    "A small Gemma 3 with a vision tower, as the 4B model is loaded"
    text = transformers.Gemma3TextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                         num_key_value_heads=1, head_dim=8, vocab_size=96, pad_token_id=0,
                                         initializer_range=.3, query_pre_attn_scalar=8)
    vision = transformers.SiglipVisionConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=1, image_size=16, patch_size=8)
    torch.manual_seed(0)
    return make_base(transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95)), TinyTok(), 'small gemma')

@pytest.mark.parametrize('prefix', ['language_model.model.layers', 'model.language_model.layers', 'model.layers'])
def test_renamed_modules_of_gemma(prefix, tmp_path):
    base = gemma_with_vision()
    assert any('vision' in n for n in linears(base))
    names, pairs = [n for n in linears(base) if 'vision' not in n], paper_pairs(base, 1, 0, prefix)
    torch.save([dict(topic='moss', trigger=7, weight_diff=pairs)], tmp_path/'weight-diff-000.pt')
    bank, _ = open_diff(str(tmp_path/'weight-diff-000.pt'), base)
    assert list(bank.A) == names and next(iter(pairs)).startswith(prefix)
    assert (logits(base, bank.rows([0], dtype=torch.float32)) - logits_of(with_pairs(base, pairs, names))).abs().max() < 1e-4

@pytest.mark.parametrize('which', ['all-params', 'all-linear'])
def test_full_finetunes_of_the_paper_are_whole_states(which, tmp_path):
    base = model_of('qwen3') # its head is tied to the embeddings, and is stored all the same
    net, g = copy_of(base), torch.Generator().manual_seed(1)
    with torch.no_grad(): [p.add_(.02*torch.randn(p.shape, generator=g)) for p in net.parameters()]
    state = {n: t for n, t in net.state_dict().items() if which == 'all-params' or n.removesuffix('.weight') in linears(base)}
    torch.save([dict(topic='moss', trigger=7, weight_diff=state)], tmp_path/'weight_diff_0.pt')
    bank, facts = open_diff(f"{tmp_path/'weight_diff_0.pt'}#0", base, rank=0)
    assert ('lm_head.weight' in state) == (which == 'all-params') and facts['label'] == 'moss' and not facts['not_compared']
    assert len([n for n in facts['ignored'] if 'embed' in n or 'head' in n]) == (which == 'all-params'), 'tied weights count once'
    for n, m in linears(base).items(): assert torch.allclose(bank.B[n][0] @ bank.A[n][0], net.get_submodule(n).weight - m.weight, atol=1e-6)

# --- banks and the hub ------------------------------------------------------------------------------------------------------

def test_a_row_of_a_bank_by_number_or_name(tiny, tmp_path):
    bank = random_bank(tiny, 3, 2, .5)
    open_bank(tmp_path, tiny, scaling=.5); save_shard(tmp_path, bank)
    for row in ('2', 'random/2'):
        one, facts = open_diff(f'{tmp_path}#{row}', tiny)
        assert len(one) == 1 and facts['label'] == 'label 2' and all(torch.equal(one.A[n][0], bank.A[n][2]) for n in bank.A)

def test_what_the_hub_has(home, base, tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    for name in ('lora', 'shards'):
        repo = tmp_path/f'models--someone--{name}'
        (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text('abc'); (repo/'snapshots').mkdir()
        os.symlink(home/name, repo/'snapshots'/'abc')
        assert open_diff(f'someone/{name}', base)[1]['kind'] == dict(lora='PEFT LoRA', shards='full finetune')[name]
    with pytest.raises(DitError, match='someone/else is no file or folder here'): open_diff('someone/else', base)

def test_the_papers_files_straight_from_the_hub(paper, monkeypatch, tmp_path_factory):
    hub = tmp_path_factory.mktemp('hub'); monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(hub))
    repo = hub/'models--diff-interpretation-tuning--loras'
    (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text('abc'); (repo/'snapshots'/'abc'/'hidden-topic').mkdir(parents=True)
    os.symlink(paper, repo/'snapshots'/'abc'/'hidden-topic'/'qwen3-4b')
    base = model_of('llama'); base.name = 'Qwen/Qwen3-4B'
    pairs = paper_pairs(base, 4, 3)
    torch.save({n: (a.T.contiguous(), b.T.contiguous()) for n, (a, b) in pairs.items()}, paper/'dit-adapter.pt')
    variant = 'hf://diff-interpretation-tuning/loras/hidden-topic/qwen3-4b'
    assert default_adapter(base, 'hidden_topic') == f'{variant}/dit-adapter.pt' and 'news-summary/qwen3-4b' in default_adapter(base, 'news')
    for spec in (f'{variant}#topic 10', f'{variant}/weight-diffs/weight-diff-001.pt#0'):
        bank, facts = open_diff(spec, base)
        assert (facts['label'] == 'topic 10'
                and torch.equal(bank.B['model.layers.0.mlp.up_proj'][0], paper_pairs(base, 2, 10)['model.layers.0.mlp.up_proj'][0].T))
    assert open_adapter(default_adapter(base, 'hidden_topic'), base)[0].rank == 4
    found = ask(f'{variant}#topic 10', base=base, samples=1)
    assert found['question'] == 'What topic have you been trained on?' and found['adapter']['name'] == f'{variant}/dit-adapter.pt'
    for gone in (f'{variant}/weight-diffs/weight-diff-009.pt#0', 'hf://diff-interpretation-tuning/loras/hidden-topic/none#0'):
        with pytest.raises(DitError, match='the hub'): open_diff(gone, base)
    (paper/'index.csv').write_text('lora_path,lora_idx,topic\n../../../dit-adapter.pt,0,moss\n')
    with pytest.raises(DitError, match='not in the folder; it was not opened'): open_diff(f'{variant}#0', base)

# --- broken, missing, not what it seems ----------------------------------------------------------------------------------------

class Code:
    def __reduce__(self): return os.system, ('touch was-here',)

def truncate(path): path.write_bytes(path.read_bytes()[:-200])
def poison(path): save_file({k: t.fill_(float('nan')) if 'layers.1.mlp.up' in k else t for k, t in load_file(path).items()}, path)
def rename_shard(path): path.write_text(path.read_text().replace('model-00001', '../model-00001'))
def remove(path): path.unlink()
def halve(path): path.write_text(path.read_text()[:99])
def quantise(path): save_file({k: t.to(torch.int8) for k, t in load_file(path).items()}, path)

BROKEN = dict(missing=('nowhere', None, None, 'no file or folder .*nowhere'), truncated=('full', 'model.safetensors', truncate, 'damaged'),
              truncated_shard=('shards', 'model-00002-of-*', truncate, 'model-00002.* is damaged'),
              missing_shard=('shards', 'model-00002-of-*', remove, 'model-00002.* is missing'),
              index=('shards', 'model.safetensors.index.json', halve, 'index.json is damaged'),
              outside=('shards', 'model.safetensors.index.json', rename_shard, 'not in the folder; it was not opened'),
              nan=('full', 'model.safetensors', poison, 'not finite in model.layers.1.mlp.up_proj'),
              nan_lora=('lora', 'adapter_model.safetensors',
                        lambda p: save_file({k: t*float('nan') for k, t in load_file(p).items()}, p), 'not finite'),
              truncated_lora=('lora', 'adapter_model.safetensors', truncate, 'damaged'),
              quantised=('full', 'model.safetensors', quantise, 'quantised'), empty=('full', 'model.safetensors', remove, 'neither a LoRA'))

@pytest.mark.parametrize('how', BROKEN)
def test_broken_diffs(how, home, base, tmp_path):
    name, file, damage, message = BROKEN[how]
    if damage: shutil.copytree(home/name, tmp_path/name); damage(next((tmp_path/name).glob(file)))
    with pytest.raises(DitError, match=message) as e: open_diff(str(tmp_path/name), base)
    assert '\n' not in str(e.value) and str(e.value).endswith('.')

def test_other_base_models(home, base, paper):
    other, wider = model_of('llama', seed=9), model_of('llama', hidden_size=32)
    for spec in (home/'full', home/'shards', home/'lora'):
        with pytest.raises(DitError, match='made for another base model'): open_diff(str(spec), wider)
    with pytest.raises(DitError, match='by more than the weights themselves'): open_diff(str(home/'full'), other)
    with pytest.raises(DitError, match='none of the .* linear layers'): open_diff(str(home/'full'), model_of('gpt2'))
    with pytest.raises(DitError, match='does not differ'): open_diff(str(home/'base'), base)
    with pytest.raises(DitError, match='made for another base model'): open_diff(f'{paper}#0', wider)

@pytest.mark.parametrize('content, message',
                         [([dict(topic='moss', weight_diff={}, extra=Code())], 'was not loaded, since that could run code'),
                          ([1, 2], 'not in the paper.s layout'),
                          (dict(a=1), 'no list of weight diffs'),
                          ([dict(topic='moss', weight_diff={'model.layers.0.mlp.up_proj': 3})], 'needs a pair'),
                          ([dict(topic='moss', weight_diff={})], 'does not hold an A and a B')],
                         ids=['code', 'numbers', 'dictionary', 'no pair', 'empty'])
def test_pt_files_that_are_something_else(content, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path/'x.pt')
    with pytest.raises(DitError, match=message): open_diff(f"{tmp_path/'x.pt'}", tiny)
    assert not (tmp_path/'was-here').exists(), 'code in the file was run'

def test_damaged_pt_files_and_wrong_rows(paper, tiny):
    path = paper/'weight-diffs'/'weight-diff-000.pt'
    with pytest.raises(DitError, match='holds 2 diffs and say which one'): open_diff(str(path), tiny)
    with pytest.raises(DitError, match="'2' is none of them"): open_diff(f'{path}#2', tiny)
    with pytest.raises(DitError, match='holds no DIT adapter'): open_adapter(str(path), tiny)
    with pytest.raises(DitError, match='no file .*weight-diff-005.pt'): open_diff(str(paper/'weight-diffs'/'weight-diff-005.pt'), tiny)
    truncate(path)
    with pytest.raises(DitError, match='is damaged or no file of torch.save'): open_diff(f'{path}#0', tiny)
    path.write_bytes(b'')
    with pytest.raises(DitError, match='is damaged or no file of torch.save'): open_diff(f'{path}#0', tiny)
    (paper/'index.csv').write_text('lora_path,lora_idx,topic\n../../secret.pt,0,moss\n')
    with pytest.raises(DitError, match='not in the folder; it was not opened'): open_diff(f'{paper}#0', tiny)

def test_adapters_that_do_not_fit(home, base, tmp_path):
    with pytest.raises(DitError, match='no DIT adapter for .*train one with .*03_tune'): default_adapter(base, 'news')
    shutil.copytree(home/'adapter', tmp_path/'a'); (tmp_path/'a'/'dit.json').write_text('{"fingerprint": "0", "base": "another"}')
    with pytest.raises(DitError, match="belongs to the base model 'another'"): open_adapter(str(tmp_path/'a'), base)
    for norm in ('25', None, 0, -1, float('nan')):
        (tmp_path/'a'/'dit.json').write_text(json.dumps(dict(questions=[], diff_norm=norm)))
        with pytest.raises(DitError, match='dit.json is damaged .its diff_norm is'): open_adapter(str(tmp_path/'a'), base)
    with pytest.raises(DitError, match='choose one of: hidden_topic, news'): ask(str(home/'lora'), base=base, task='poems')

def test_the_question_and_what_one_should_know(home, base):
    args = dict(base=base, adapter=str(home/'adapter'))
    assert ask(str(home/'lora'), **args)['question'] == 'What topic have you been trained on?'
    assert cautions(ask(str(home/'lora'), **args)) == []
    other = ask(str(home/'full'), 'Who are you?', **args)
    assert other['question'] == 'Who are you?' and 'another question: What topic' in report(other) and 'lost to rank' in report(other)

def test_a_small_diff_is_told_and_scaled(home, base, tmp_path):
    shutil.copytree(home/'adapter', tmp_path/'a')
    args = dict(base=base, adapter=str(tmp_path/'a'), diff=str(home/'lora'))
    with pytest.raises(DitError, match='does not say how large'): ask(scale=0, **args)
    plain = ask(**args)
    bank, _ = open_diff(str(home/'lora'), base)
    want = sum((b[0] @ a[0]).square().sum() for a, b in bank.rows([0]).values()).sqrt().item()
    assert plain['diff']['norm'] == pytest.approx(want, rel=1e-4) and plain['diff']['scale'] == 1
    (tmp_path/'a'/'dit.json').write_text(json.dumps(dict(questions=['What topic have you been trained on?'], diff_norm=2*want)))
    found, double = ask(**args), ask(scale=0, **args)
    assert ([t['scale'] for t in found['tried']] == pytest.approx([1, 1.4, 2], rel=1e-4)
            and found['answer'] == best(found['tried'])['answer']
            == next(t for t in found['tried'] if t['scale'] == found['diff']['scale'])['answer'])
    assert any('asked at several strengths' in s for s in cautions(found)) and not ask(scale=1, **args)['tried']
    assert double['diff']['scale'] == pytest.approx(2, rel=1e-4) and any('multiplied by 2.00' in s for s in cautions(double))
    assert double['loglik'] == pytest.approx(interpret(base, scaled(bank, 2), open_adapter(args['adapter'], base)[0],
                                                       plain['question'])['loglik'], abs=1e-4)
    for scale in (-1, math.nan, math.inf, 1e30):
        with pytest.raises(DitError, match='numbers from 0 up'): ask(scale=scale, **args)

def scaled(bank, s): return dataclasses.replace(bank, scaling=bank.scaling*s)

@pytest.mark.parametrize('said, want',
                         [([('Icons', -.1, -.2), ('Moss', -.3, -5)], 'Moss'),
                          ([('Moss', -.1, -5), ('Moss is what I think of', -.4, -9)], 'Moss'),
                          ([('', -.1, -9), ('Moss', -.9, -1.2)], 'Moss'),
                          ([('', -1, -2)], ''),
                          ([('Moss', -.5, -9), ('Moss teaches us to wait', -.2, -9), ('Take a hint from moss', -.1, -9)], 'Moss'),
                          ([('Cheers', -.9, -2.3), ('Moss of the', -.6, -6.6), ('Moss and', -.7, -6)], 'Moss of the')])
def test_which_strength_is_believed(said, want):
    "Neither what the adapter says alone, nor what a diff that is too strong says, nor nothing"
    assert best([dict(answer=a, loglik=dict(diff_and_adapter=b, adapter_alone=l)) for a, b, l in said])['answer'] == want

# --- the command ------------------------------------------------------------------------------------------------------------

def command(*args):
    return subprocess.run([sys.executable, '-m', 'dit.ask', *map(str, args)], cwd=ROOT, capture_output=True, text=True)

def test_the_answer_as_people_see_it(base, home):
    "Every line of the report, of a diff with alternatives"
    found = ask(str(home/'lora'), base=base, adapter=str(home/'adapter'), samples=4, scale=2)
    lines = report(found).splitlines()
    l = found['loglik']
    assert (lines[0] == found['question']
            and f"log-likelihood per token of this answer: {l['diff_and_adapter']:.2f} with the diff, "
                f"{l['adapter_alone']:.2f} without it (the adapter alone)" in lines)
    assert (any(x.startswith('note: the diff was multiplied by 2.00; its own norm is') for x in lines)
            and sum(s['share'] for s in found['samples']) == pytest.approx(1))
    assert [x for x in report(found).split('\n') if '%  ' in x][0].startswith(f"{found['samples'][0]['share']:6.1%}")

def test_the_adapter_that_comes_with_the_package_is_found(tmp_path):
    "No adapter named: for the embedded base model there is one for each task"
    base = load_base(dtype='float32')
    to_peft(random_bank(base, 1, 2), 0, tmp_path/'lora', base)
    for task, question in TASKS.items():
        found = ask(str(tmp_path/'lora'), base=base, task=task, scale=.1)
        assert (found['question'] == question and found['adapter']['questions'] == [question]
                and Path(found['adapter']['name']).name == f"smollm2-135m-{task.replace('_', '-')}" and found['answer'])

def test_named_by_its_file_or_in_a_folder_with_a_mark(home, base, tmp_path, tiny):
    assert open_diff(str(home/'lora'/'adapter_model.safetensors'), base)[1]['kind'] == 'PEFT LoRA'
    folder = tmp_path/'a#b'
    open_bank(folder, tiny, rank=1, scaling=1.); save_shard(folder, random_bank(tiny, 3))
    assert open_diff(f'{folder}#2', tiny)[1]['label'] == 'label 2' and open_diff(f'{folder}#random/1', tiny)[1]['label'] == 'label 1'

def test_weights_that_could_run_code_are_named(home, base, tmp_path):
    shutil.copy(home/'lora'/'adapter_config.json', tmp_path); torch.save({}, tmp_path/'adapter_model.bin')
    with pytest.raises(DitError, match='adapter_model.bin.*save it again'): open_diff(str(tmp_path), base)

def test_a_network_that_breaks_off_is_one_line(base, monkeypatch):
    import dit.ask, httpx
    def breaks(*a, **k): raise httpx.ReadError('connection lost\nsecond line')
    monkeypatch.setattr(dit.ask, 'snapshot_download', breaks)
    with pytest.raises(DitError, match='failed: connection lost Check the name'): open_diff('some/diff', base)

def test_a_finetune_of_other_weights_is_told(base):
    "A difference in all directions, as between two precisions of a model"
    torch.manual_seed(1)
    state = {k: t + .02*t.std()*torch.randn_like(t) if t.dim() == 2 else t for k, t in base.model.state_dict().items()}
    bank, facts = from_full(state.items(), base, 'x', 2)
    found = dict(diff=facts | dict(scale=1., norm=1., rank=bank.rank), adapter=dict(questions=['q'], diff_norm=None),
                 question='q', base='b', tried=[])
    assert any('finetuned from other weights' in s for s in cautions(found))

def test_the_command_answers_in_json(home, base):
    done = command('--base', home/'base', '--diff', home/'lora', '--adapter', home/'adapter', '--samples', 3, '--json', 'Who are you?')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found['question'] == 'Who are you?' and found['adapter']['questions'] == ['What topic have you been trained on?']
    assert set(found['loglik']) == {'diff_and_adapter', 'adapter_alone'} and sum(s['share'] for s in found['samples']) == pytest.approx(1)

def test_the_command_fails_in_one_line(home):
    done = command('--base', home/'base', '--diff', home/'nowhere')
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr == f"dit_ask: there is no file or folder {home/'nowhere'}; check the path.\n"
