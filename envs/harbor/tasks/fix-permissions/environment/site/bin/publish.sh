#!/bin/bash
echo published
