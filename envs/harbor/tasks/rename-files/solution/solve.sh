#!/bin/bash
set -e
cd /app/reports
for file in *' '??-??-????.txt; do
  word=${file%% *}
  date=${file##* }
  date=${date%.txt}
  mv "$file" "${date:6:4}-${date:3:2}-${date:0:2}-$word.txt"
done
