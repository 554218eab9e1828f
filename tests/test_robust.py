"Nothing is lost, nothing unsafe is run, nothing fails silently"
import contextlib, json, os, random, resource, shutil, signal
from pathlib import Path

import pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from dit.core import *
from dit.core import plain
from dit.lora import load_bank
from helpers import COUNTS
import strangers

@contextlib.contextmanager
def at_most(seconds):
    "Fails instead of hanging"
    def stop(*_): raise TimeoutError('it hangs')
    before = signal.signal(signal.SIGALRM, stop); signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, before)

# --- files from strangers -----------------------------------------------------------------------------------------------------

CASES = list(strangers.cases())

@pytest.fixture(scope='module')
def good(tiny, tmp_path_factory):
    "One good file or folder per reader"
    root = tmp_path_factory.mktemp('good')
    for name, (make, _, _) in strangers.READERS.items(): make(root/name, tiny)
    return root

def same(a, b):
    "Was the same read?"
    if isinstance(a, pd.DataFrame): return a.equals(b)
    if hasattr(a, 'A'): return a.index.equals(b.index) and all(torch.equal(a.A[n], b.A[n]) and torch.equal(a.B[n], b.B[n]) for n in a.A)
    return same(a[0], b[0]) if isinstance(a, tuple) else a == b

def read(reader, folder, base):
    with at_most(60): return strangers.READERS[reader][1](folder, base)

@pytest.mark.parametrize('reader', strangers.READERS)
def test_what_is_whole_is_read(reader, good, tiny): assert same(read(reader, good/reader, tiny), read(reader, good/reader, tiny))

def refused(reader, folder, base):
    "True for a `DitError` of one line, False when it was read; anything else fails"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try: read(reader, folder, base); error = None
    except DitError as e: error = str(e)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, 'more than 200 MB were taken'
    assert not list(folder.parent.glob('was-here')), 'code in the file was run'
    if error: assert error == plain(error) and '\n' not in error and 20 < len(error) <= 1000, error
    return bool(error)

@pytest.mark.parametrize('reader, damage', [(r, d) for r, _, d in CASES], ids=[f'{r}, {n}'.encode('ascii', 'backslashreplace').decode() for r, n, _ in CASES])
def test_broken_files(reader, damage, good, tiny, tmp_path):
    shutil.copytree(good/reader, tmp_path/'x')
    damage(tmp_path/'x', tiny)
    COUNTS['broken inputs refused' if refused(reader, tmp_path/'x', tiny) else 'broken inputs read all the same'] += 1
