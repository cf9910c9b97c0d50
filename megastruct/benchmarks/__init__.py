"""Measurements that compare what this project does with what others would do, from one run on one machine."""
