#!/bin/bash
set -e
cat > /app/count_words.sh <<'SCRIPT'
#!/bin/bash
# Prints each text file of a folder with its number of words.
folder=$1
for file in "$folder"/*.txt; do
  words=$(wc -w < "$file")
  printf '%s\t%s\n' "$(basename "$file")" "$words"
done
SCRIPT
