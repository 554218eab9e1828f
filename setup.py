"Packaging of `dit`: everything that can change is in settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
rows = lambda key: [o.strip() for o in cfg[key].splitlines() if o.strip()]
readme, lib = root/'README.md', root/cfg['lib_path']
data = [p.relative_to(lib).as_posix() for p in sorted(lib.rglob('*')) # every file below dit/ that is not code: word lists, adapters
        if p.is_file() and p.suffix not in ('.py', '.pyc') and not any(o.startswith('.') for o in p.relative_to(lib).parts)]

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
      license='Apache-2.0', license_files=['LICENSE'], keywords=cfg['keywords'],
      long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
      packages=find_packages(include=[cfg['lib_name'], cfg['lib_name']+'.*']), package_data={cfg['lib_name']: data},
      python_requires='>='+cfg['min_python'], install_requires=rows('requirements'), extras_require={'dev': rows('dev_requirements')},
      entry_points={'console_scripts': rows('console_scripts'), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]})
