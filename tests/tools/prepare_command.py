"""The command tools.prepare as tests call it."""

from dpo_jax.tools import arguments, prepare


def run(source, out, *flags, layout='pickapic'):
  prepare.main(
    [f'--source={source}', f'--out={out}', f'--format={layout}', *flags]
  )


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def error_of(capsys, *flags):
  code = arguments.run(prepare.main, flags)
  text = capsys.readouterr().err
  assert code == 2
  lines = [line for line in text.splitlines() if line.startswith('error:')]
  assert text.splitlines()[-1] == lines[0]
  assert len(lines) == 1
  return lines[0]
