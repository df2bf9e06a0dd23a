import json

expected = {
    "name": "greenhouse",
    "port": 8443,
    "tls": {"enabled": True, "cert": "/etc/greenhouse/cert.pem"},
    "allowed_hosts": ["localhost", "greenhouse.example", "backup.example"],
    "retries": 3,
}
with open("/app/settings.json") as file:
    assert json.load(file) == expected
