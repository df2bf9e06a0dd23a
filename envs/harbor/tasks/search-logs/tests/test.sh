#!/bin/bash
# Reward 1 if check.py finds everything as the instruction asks, else 0.
if python3 /tests/check.py; then
  echo 1 > /logs/verifier/reward.txt
else
  echo 0 > /logs/verifier/reward.txt
fi
