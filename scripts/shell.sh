# What tpu_pod.sh, tpu_host.sh and xpk_run.sh share. Sourced, not run.
# shellcheck shell=bash

# Words as one line of shell, single-quoted where needed.
quote() {
  local word flag out="" escaped="'\\''"
  for word in "$@"; do
    flag=""
    if [[ $word =~ ^--[a-z_-]+= ]]; then # --command='a b' reads better than '--command=a b'
      flag=${BASH_REMATCH[0]}
      word=${word#"$flag"}
    fi
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      out+=" $flag$word"
    else
      out+=" $flag'${word//\'/$escaped}'"
    fi
  done
  printf '%s' "${out# }"
}
