"""Django's settings: its database is the one that aioworker protects."""

import os
from urllib.parse import urlsplit

import pymysql

pymysql.install_as_MySQLdb()  # aioworker brings it; a site of your own has mysqlclient

_url = urlsplit(os.environ.get("AIOWORKER_MYSQL_URL", "mysql://root@127.0.0.1:3306/aioworker"))
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.mysql",
        "HOST": _url.hostname,
        "PORT": _url.port,
        "USER": _url.username,
        "PASSWORD": _url.password,
        "NAME": _url.path[1:],
    }
}
INSTALLED_APPS = ["reviews"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "an example's"
# Errors are logged where the process logs, not mailed; the worker's own lines stay as they are.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "loggers": {"django": {"handlers": []}},
}
