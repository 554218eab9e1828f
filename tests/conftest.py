"Settings for all tests: no network, one thread a core, reproducible property tests; and what the robustness tests counted"
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import pytest
from hypothesis import settings
from helpers import COUNTS, faulty_server, model_of

settings.register_profile('dit', deadline=None, derandomize=True, max_examples=60)
settings.load_profile('dit')

@pytest.fixture(scope='session')
def tiny():
    "A small random Llama in float32; tests leave it as they found it"
    return model_of('llama')

@pytest.fixture
def server():
    "A real endpoint on the loopback address, with faults on demand"
    with faulty_server() as s: yield s

def pytest_terminal_summary(terminalreporter):
    if COUNTS: terminalreporter.write_line('robustness: ' + ', '.join(f'{n} {what}' for what, n in COUNTS.items()))
