#!/bin/bash
# Each node is looked at before anything is loaded on it.
