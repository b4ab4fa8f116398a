"""Matrix E18. Holds the Kubernetes manifests to what the schemas can't know: the restricted Pod Security Standard, and what the proxy needs to work as promised.

usage: check_manifests.py MANIFEST...
"""

import sys

import yaml

PROXY = "upsolver-auth-proxy"
MOUNTED_SECRETS = "/var/run/secrets/upsolver"


def rules_of_pod(template):
    """Each rule that a Pod template must follow: whether it does, and what it is about."""
    spec = template["spec"]
    containers = spec.get("initContainers", []) + spec["containers"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    context = spec.get("securityContext", {})

    # https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and no token for the Kubernetes API.
    yield context.get("runAsNonRoot") is True, "runAsNonRoot"
    yield context.get("seccompProfile") == {"type": "RuntimeDefault"}, "seccompProfile"
    yield spec.get("automountServiceAccountToken") is False, "automountServiceAccountToken"
    for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        yield not spec.get(field), f"{field} lets others reach the proxy or its memory"
    yield all({"configMap", "secret", "emptyDir"} & volume.keys() for volume in volumes.values()), "volume types"
    for container in containers:
        name, own = container["name"], container.get("securityContext", {})
        yield own.get("allowPrivilegeEscalation") is False, f"{name}: allowPrivilegeEscalation"
        yield own.get("readOnlyRootFilesystem") is True, f"{name}: readOnlyRootFilesystem"
        yield own.get("capabilities") == {"drop": ["ALL"]}, f"{name}: capabilities"
        yield own.get("runAsUser", 0) > 0, f"{name}: runAsUser"
        yield "memory" in container.get("resources", {}).get("limits", {}), f"{name}: memory limit"

    # C45: the proxy starts before the app and is stopped after it.
    proxies = [container for container in spec.get("initContainers", []) if container["name"] == PROXY]
    yield len(proxies) == 1, "one native sidecar"
    proxy = proxies[0]
    yield proxy.get("restartPolicy") == "Always", "restartPolicy: Always makes it a native sidecar"
    for probe in ("startupProbe", "livenessProbe"):
        yield proxy.get(probe, {}).get("exec", {}).get("command", [""])[0] == f"/{PROXY}", f"{probe} by exec: the admin server is on localhost"
    startup = proxy["startupProbe"]
    yield startup["periodSeconds"] * startup["failureThreshold"] >= 3600, "the startup probe must outlast an outage: a restart presents the password again"
    apps = {container.get("securityContext", {}).get("runAsUser") for container in spec["containers"]}
    yield proxy["securityContext"]["runAsUser"] == context.get("fsGroup") == 65532, "the proxy's user is the image's, and fsGroup its group"
    yield 65532 not in apps, "the app runs as another user than the proxy"

    # C32, C38: secrets as whole directories that follow a rotation, for the proxy alone; the token in memory.
    mounts = proxy.get("volumeMounts", [])
    yield all("subPath" not in mount and "subPathExpr" not in mount for mount in mounts), "a subPath mount never follows a change"
    secrets = [mount for mount in mounts if "secret" in volumes[mount["name"]]]
    yield [mount["mountPath"] for mount in secrets] == [MOUNTED_SECRETS], "the Secret's place"
    for mount in secrets:
        yield volumes[mount["name"]]["secret"].get("defaultMode") == 0o440, "the Secret's mode"
        shared = [container["name"] for container in spec["containers"] if mount["name"] in [other["name"] for other in container.get("volumeMounts", [])]]
        yield not shared, f"the Secret is mounted in {shared}"
    for mount in mounts:
        if "emptyDir" in volumes[mount["name"]]:
            yield volumes[mount["name"]]["emptyDir"].get("medium") == "Memory", "the token store is in memory"
    variables = {variable["name"] for container in containers for variable in container.get("env", [])}
    yield not variables & {"UPSOLVER_EMAIL", "UPSOLVER_PASSWORD"}, "credentials as environment variables can't rotate"

    # The grace period is shared with the app; the proxy's part is shutdown.drain_timeout.
    yield spec.get("terminationGracePeriodSeconds", 30) >= 55, "grace period: 30 s for the app, 25 s for the proxy"


def main(paths):
    """Prints each problem; the exit status says whether there was one."""
    pods = failures = 0
    for path in paths:
        with open(path, encoding="utf-8") as file:
            for manifest in filter(None, yaml.safe_load_all(file)):
                template = manifest.get("spec", {}).get("template")
                if template is None:
                    continue
                pods += 1
                pod = f"{manifest['kind']} {manifest['metadata']['name']}"
                for holds, what in rules_of_pod(template):
                    if not holds:
                        failures += 1
                        print(f"{path}: {pod}: {what}")
    if pods < 2:
        failures += 1
        print(f"expected a Deployment and a Job, found {pods} Pod templates")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
