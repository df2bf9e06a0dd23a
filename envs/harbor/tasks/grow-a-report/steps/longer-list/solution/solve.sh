#!/bin/bash
set -e
cat /app/more-visits.txt >> /app/visits.txt
rm /app/more-visits.txt
sort /app/visits.txt | uniq -c | sort -k1,1nr -k2,2 | awk '{print $2, $1}' > /app/report.txt
