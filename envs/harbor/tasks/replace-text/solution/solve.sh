#!/bin/bash
set -e
cd /app
sed -i 's/import water as water$/import irrigate as irrigate/' garden/__init__.py
sed -i 's/^def water(/def irrigate(/' garden/plants.py
sed -i -e 's/import underwater, water$/import irrigate, underwater/' -e 's/^plant = water(/plant = irrigate(/' garden/__main__.py
