"""The benchmark: stages that prepare data, train every optimizer on it and compare them, declared in dvc.yaml."""
