with open("/app/answer.txt") as file:
    assert file.read().split() == ["10.0.0.17", "23"]
