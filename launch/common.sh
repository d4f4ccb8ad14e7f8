# Shared by the launchers; source it, do not run it.
# shellcheck shell=bash

die() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the top of a launcher is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Runs a command, or with --dry_run prints it as it would be typed.
run() {
  if [[ ${dry_run:-false} == true ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# take NAME WORD: the value of --NAME=VALUE.
take() {
  local value=${2#--"$1"=}
  [[ -n $value ]] || die "--$1: the value is missing"
  printf '%s' "$value"
}

# need NAME...: each of these options was given.
need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || die "--$name is missing (--help explains it)"
  done
}

# is_number NAME...: each of these options is a whole number from 1.
is_number() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] ||
      die "--$name=${!name}: must be a whole number, at least 1"
  done
}

# Quotes words for a remote shell.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}
