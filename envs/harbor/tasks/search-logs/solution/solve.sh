#!/bin/bash
set -e
cat /app/logs/*.log | grep 'login failed' | sed 's/.*from=//' | sort | uniq -c | sort -rn | head -n 1 |
  awk '{print $2, $1}' > /app/answer.txt
