"The licence of every installed package, as its own metadata names it"
import importlib.metadata, sys

import pandas as pd
from dit.core import write_csv

def licence(meta):
    said = [meta.get('License-Expression'), *(c.split(' :: ')[-1] for c in meta.get_all('Classifier', []) if c.startswith('License :: ')), (meta.get('License') or '').strip().split('\n')[0][:80]]
    return next((s for s in said if s), 'not named')

def table(): return pd.DataFrame(sorted({(d.metadata['Name'], d.version, licence(d.metadata)) for d in importlib.metadata.distributions()}, key=lambda r: r[0].lower()), columns=['package', 'version', 'licence'])

if __name__ == '__main__': write_csv(sys.argv[1], table()); print(table().licence.value_counts().to_string())
