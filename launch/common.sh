# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run.
# shellcheck disable=SC2034  # the scripts that source this file use these variables

dry_run='' assume_yes='' child=''

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# A mistake in how the script was called: nothing has been created.
refuse() {
  say "$*"
  say "see ${0##*/} --help"
  exit 2
}

# `needs_value "$@"`, with an option first.
needs_value() { [[ $# -ge 2 && -n $2 ]] || refuse "$1 needs a value"; }

require() {
  local program
  [[ -z $dry_run ]] || return 0
  for program in "$@"; do
    command -v "$program" >/dev/null || refuse "$program is not installed or not on PATH"
  done
}

# Prints a command as a shell would read it.
show() {
  local word quote="'\\''"
  printf '+'
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then printf ' %s' "$word"; else printf " '%s'" "${word//\'/$quote}"; fi
  done
  printf '\n'
}

# Runs a command, or prints it with --dry-run. It runs in the background, because bash answers a signal
# only after a foreground command has ended, and following a log may take days.
call() {
  local status=0
  if [[ -n $dry_run ]]; then
    show "$@"
    return
  fi
  "$@" &
  child=$!
  wait "$child" || status=$?
  child=''
  return "$status"
}

pause() {
  [[ -n $dry_run ]] || call sleep "$1" || true
}

# Ends what `call` runs, and the ssh that gcloud starts. From the shell's own list, as a signal may come before
# `child` is set.
end_child() {
  local pid
  for pid in $(jobs -p); do
    pkill -TERM -P "$pid" 2>/dev/null || true
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  child=''
}

# Signals end the script through its EXIT trap, with the exit code that shells use for them.
exit_on_signals() {
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# `cost CHIPS PRICE SECONDS`: the price of that many chips for so long, from a price per chip and hour.
cost() { awk -v chips="$1" -v price="$2" -v seconds="$3" 'BEGIN { printf "%.2f", chips * price * seconds / 3600 }'; }

# Says what an hour costs. Prices differ by region, contract and day, so only the user's own is used.
say_price() {
  local chips=$1 price=$2
  if [[ -z $price ]]; then
    say "$chips chips; give --price PER_CHIP_HOUR to see what that costs"
  else
    say "$chips chips x $price per chip and hour = $(cost "$chips" "$price" 3600) per hour while they are held"
  fi
}

confirm() {
  local answer=''
  [[ -z $dry_run && -z $assume_yes ]] || return 0
  printf '%s [y/N] ' "$1" >&2
  read -r answer || true
  case $answer in
    y | Y | yes) ;;
    *)
      say "nothing was created"
      exit 1
      ;;
  esac
}

is_number() { [[ $1 =~ ^[0-9]+([.][0-9]+)?$ ]]; }
is_count() { [[ $1 =~ ^[0-9]+$ ]]; }
