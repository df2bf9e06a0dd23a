#!/bin/bash
# Prints each text file of a folder with its number of words.
folder=$1
for file in $(ls $folder/*.txt); do
  words=$(wc -w < $file)
  printf '%s\t%s\n' $(basename $file) $words
done
