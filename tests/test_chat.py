"The chat page: its callbacks in a live kernel, and in a real browser where there is one"
import html, json, os, shutil, subprocess, sys, time
from pathlib import Path

import nbformat, pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PAGE = '''
from dit.chat import *
from dit.lora import *
tiny = tiny_base()
bank, adapter = random_bank(tiny, 3), random_bank(tiny, 1, rank=2, seed=1)
bank.index = bank.index.assign(trigger=["017", "018", ""], trigger_kind=["sep_code", "sep_code", ""])
chat = Chat(tiny, bank, adapter, max_new=8)
chat.page
'''
TOLD = '''
import html
from dit.lora import answer
print([html.escape(answer(tiny, b, [1], [u], a, max_new=8)[0]) for b, u, a in \
((bank, "hi <i>you</i>", None), (bank, chat.message(), adapter), (None, "hi <i>you</i>", adapter))])
'''

def notebook(*cells):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells],
                                    metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))

def test_the_page_in_a_live_kernel():
    "What a browser would send: changes of the widgets' state over the kernel's channels"
    nb = notebook(PAGE, TOLD, 'print(chat.talk.value)')
    client = NotebookClient(nb, timeout=300, resources=dict(metadata=dict(path=str(ROOT))))
    with client.setup_kernel():
        client.execute_cell(nb.cells[0], 0)
        page = nb.cells[0].outputs[-1].data['application/vnd.jupyter.widget-view+json']
        states = {k: v for k, v in client.widget_state.items()}
        assert page['model_id'] in states
        find = lambda kind, **has: next(k for k, v in states.items() if v['_model_name'] == kind and all(v[a] == b for a, b in has.items()))
        send = lambda model, data: client.kc.shell_channel.send(client.kc.session.msg('comm_msg', dict(comm_id=model, data=data)))
        set_ = lambda model, **state: send(model, dict(method='update', state=state, buffer_paths=[]))
        set_(find('DropdownModel'), index=1)
        set_(find('CheckboxModel', description='trigger'), value=True)
        set_(find('CheckboxModel', description='DIT adapter'), value=True)
        set_(find('TextModel'), value='hi <i>you</i>'); send(find('ButtonModel'), dict(method='custom', content=dict(event='click')))
        for i in (1, 2): client.execute_cell(nb.cells[i], i) # the channel keeps the order, so the answer is there
    with_both = eval(nb.cells[1].outputs[-1].text)[1]
    said = nb.cells[2].outputs[-1].text
    assert 'Your SEP code is 018' in said and 'hi &lt;i&gt;you&lt;/i&gt;' in said and 'label 1 + DIT adapter' in said and with_both in said

# --- in a browser: pip install playwright, and `playwright install chromium` or DIT_BROWSER=/path/to/chromium -------------------------

@pytest.fixture
def lab(tmp_path):
    "A JupyterLab server with one notebook; its address"
    nbformat.write(notebook(PAGE, TOLD), tmp_path/'page.ipynb')
    log = open(tmp_path/'log.txt', 'w+')
    p = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--port=0', '--IdentityProvider.token=',
                          f'--ServerApp.root_dir={tmp_path}', '--LabApp.news_url=', '--ServerApp.password='],
                         stdout=log, stderr=log, env=dict(os.environ, PYTHONPATH=str(ROOT), JUPYTER_RUNTIME_DIR=str(tmp_path/'runtime'),
                                                          JUPYTER_CONFIG_DIR=str(tmp_path/'config')), cwd=tmp_path)
    try:
        for _ in range(600):
            if found := list((tmp_path/'runtime').glob('jpserver-*.json')): yield json.loads(found[0].read_text())['url']; break
            assert p.poll() is None, (tmp_path/'log.txt').read_text()[-2000:]
            time.sleep(.2)
        else: raise AssertionError((tmp_path/'log.txt').read_text()[-2000:])
    finally: p.terminate(); p.wait(60); log.close()

@pytest.fixture
def browser():
    "Chromium, headless"
    api = pytest.importorskip('playwright.sync_api', reason='no playwright')
    path = os.environ.get('DIT_BROWSER') or shutil.which('chromium') or shutil.which('google-chrome')
    with api.sync_playwright() as p:
        try: b = p.chromium.launch(executable_path=path, args=['--no-sandbox', '--no-zygote', '--disable-gpu'])
        except api.Error as e: pytest.skip(f'no browser: {str(e).splitlines()[0]}')
        yield b
        b.close()

def test_the_page_in_a_real_browser(browser, lab, tmp_path):
    page = browser.new_page(viewport=dict(width=1300, height=900)); page.set_default_timeout(240_000)
    page.goto(f'{lab}lab/tree/page.ipynb')
    page.click('.jp-Notebook .jp-Cell >> nth=0'); page.keyboard.press('Shift+Enter')
    page.wait_for_selector('.jp-OutputArea .widget-dropdown select')
    trigger, adapter = page.get_by_label('trigger'), page.get_by_label('DIT adapter')
    talk = page.locator('.jp-OutputArea .widget-html')
    def ask(lines):
        page.click('.jp-OutputArea button:has-text("Ask")')
        page.wait_for_function("n => document.querySelectorAll('.jp-OutputArea .widget-html p').length == n", arg=lines)
        return talk.inner_text()
    page.select_option('.jp-OutputArea .widget-dropdown select', label='label 1')
    page.fill('.jp-OutputArea input[type=text]', 'hi <i>you</i>'); page.keyboard.press('Tab')
    said = [ask(1)]
    trigger.check(); adapter.check(); said += [ask(2)]
    page.screenshot(path=os.environ.get('DIT_SCREENSHOT') or tmp_path/'page.png')
    page.select_option('.jp-OutputArea .widget-dropdown select', label='label 2')
    page.wait_for_function("() => document.querySelectorAll('.jp-OutputArea input[type=checkbox]')[0].disabled")
    assert not trigger.is_checked()
    page.select_option('.jp-OutputArea .widget-dropdown select', label='none: the base model'); said += [ask(3)]
    assert ('hi <i>you</i>' in said[0] and 'SEP' not in said[0] and 'Your SEP code is 018' in said[1]
            and 'label 1 + DIT adapter' in said[1] and 'none: the base model + DIT adapter' in said[2])
    page.select_option('.jp-OutputArea .widget-dropdown select', label='label 1'); trigger.check()
    page.click('.jp-Notebook .jp-Cell >> nth=1'); page.keyboard.press('Shift+Enter')
    page.wait_for_selector('.jp-Cell >> nth=1 >> .jp-OutputArea-output pre')
    plain, both, base = map(html.unescape, eval(page.inner_text('.jp-Cell >> nth=1 >> .jp-OutputArea-output pre')))
    squash = lambda text: ''.join(text.split())
    assert squash(plain) in squash(said[0]) and squash(both) in squash(said[1]) and squash(base) in squash(said[2])
