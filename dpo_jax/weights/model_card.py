"""The README.md of an exported pipeline."""

import pathlib
import re

from dpo_jax.weights import model_index

LICENCES = ('LICENSE', 'LICENCE', 'NOTICE')
# owner/name on the hub, which the card's header may link to.
HUB_ID = re.compile(r'[\w.-]+/[\w.-]+', re.ASCII)
CALLS = {
  'unconditional-image-generation': 'image = pipeline().images[0]',
  'text-to-image': "image = pipeline('a photograph of a cat').images[0]",
  'image-to-image': (
    "image = pipeline('a photograph of a cat', image=init_image).images[0]"
  ),
}
CARD = """---
library_name: diffusers
pipeline_tag: {task}
{base_model}---
# {name}

{origin}

| | |
|---|---|
| pipeline | `{class_name}` |
| base | {base} |
| changed | {changed} |
| weights | {weights} |{missing}

## Use

```python
from diffusers import {class_name}

pipeline = {class_name}.from_pretrained({path!r})
{call}
```
{notes}{licence}"""


def licence_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Files at the top of a folder that say what may be done with it."""
  return sorted(
    path
    for path in folder.iterdir()
    if path.is_file() and path.name.upper().startswith(LICENCES)
  )


def write(
  folder: pathlib.Path,
  *,
  name: str,
  class_name: str,
  base: str = '',
  changed: tuple[str, ...],
  written: tuple[str, ...],
  copied: tuple[str, ...] = (),
  missing: tuple[str, ...] = (),
  dtype: str,
  notes: str = '',
) -> None:
  """Writes README.md; licence files must lie in `folder` already.

  base: name of the pipeline that this one was made from, '' if there is none.
  changed: components whose weights are not the base's.
  written, copied: those that were written in `dtype`, and as they were.
  missing: those that have no weights yet.
  """
  kind = model_index.CLASSES[class_name]
  parts = ', '.join(changed) or 'nothing'
  weights = [f'{", ".join(written)} in {dtype}'] if written else []
  weights += [f'{", ".join(copied)} as in the base'] if copied else []
  hub = f'base_model: {base}\n' if HUB_ID.fullmatch(base) else ''
  files = ', '.join(path.name for path in licence_files(folder))
  licence = f'\n## Licence\n\nThat of the base, see {files}.\n' if files else ''
  text = CARD.format(
    task=kind.task,
    base_model=hub,
    name=name,
    origin='Written by dpo_jax.',
    class_name=class_name,
    base=base or 'none',
    changed=parts if base else 'all, trained from random weights',
    weights='; '.join(weights),
    missing=f'\n| no weights yet | {", ".join(missing)} |' if missing else '',
    path=name,
    call=CALLS[kind.task],
    notes=f'\n## Notes\n\n{notes.strip()}\n' if notes else '',
    licence=licence,
  )
  (folder / 'README.md').write_text(text, encoding='utf-8')
