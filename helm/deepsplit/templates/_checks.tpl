{{/* Values that are each right and together wrong. Every message names the value and the fix. */}}
{{- define "deepsplit.checks" -}}
{{- $model := .Values.model -}}
{{- $path := .Values.config.model.path -}}
{{- if not (hasPrefix "/" $path) -}}
{{- fail (printf "config.model.path is %s: give the absolute path in the pods, such as %s/deepseek-v3" $path $model.mountPath) -}}
{{- end -}}
{{- if and (ne $model.source "image") (not (hasPrefix (printf "%s/" $model.mountPath) (printf "%s/" $path))) -}}
{{- fail (printf "config.model.path is %s, but model.source %s is mounted at %s: set config.model.path below model.mountPath" $path $model.source $model.mountPath) -}}
{{- end -}}
{{- if and (eq $model.source "pvc") (not $model.pvc.claimName) -}}
{{- fail "model.source is pvc: set model.pvc.claimName to a claim that holds the checkpoint" -}}
{{- end -}}
{{- if and (eq $model.source "hostPath") (not $model.hostPath.path) -}}
{{- fail "model.source is hostPath: set model.hostPath.path to the checkpoint's folder on the nodes" -}}
{{- end -}}
{{- if and (eq $model.source "csi") (not $model.csi.driver) -}}
{{- fail "model.source is csi: set model.csi.driver to the volume's driver" -}}
{{- end -}}
{{- if and (eq $model.source "objectStore") (or (not $model.objectStore.image) (not $model.objectStore.command)) -}}
{{- fail "model.source is objectStore: set model.objectStore.image and model.objectStore.command, which fetches the checkpoint into model.mountPath" -}}
{{- end -}}
{{- if regexMatch "(^[^@:]+$|:latest$)" (last (splitList "/" ($model.objectStore.image | default "x:1"))) -}}
{{- fail (printf "model.objectStore.image is %s: name a version or a digest" $model.objectStore.image) -}}
{{- end -}}
{{- range $role := list "gateway" "internal" -}}
{{- $tls := get $.Values.tls $role -}}
{{- if and (eq $tls.mode "secret") (not $tls.secretName) -}}
{{- fail (printf "tls.%s.mode is secret: set tls.%s.secretName to a Secret with tls.crt and tls.key%s" $role $role (ternary " and ca.crt" "" (eq $role "internal"))) -}}
{{- end -}}
{{- if and (eq $tls.mode "certManager") (not $tls.issuerRef.name) -}}
{{- fail (printf "tls.%s.mode is certManager: set tls.%s.issuerRef.name to an Issuer or ClusterIssuer" $role $role) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.auth.anonymous (or .Values.auth.tenants .Values.auth.existingSecret) -}}
{{- fail "auth.anonymous lets everybody in, but auth.tenants or auth.existingSecret is set: drop one of the two" -}}
{{- end -}}
{{- if and .Values.auth.existingSecret .Values.auth.tenants -}}
{{- fail "auth.existingSecret holds the tenants: put those of auth.tenants into its keys.yaml" -}}
{{- end -}}
{{- $experts := .Values.config.experts | default dict -}}
{{- $attention := .Values.config.attention | default dict -}}
{{- $workers := 0 -}}
{{- range $name, $group := .Values.experts.groups -}}
{{- $workers = add $workers $group.workers -}}
{{- if $group.workers -}}
{{- $at := printf "experts.groups.%s" $name -}}
{{- $gpus := get $group.resources.limits "nvidia.com/gpu" -}}
{{- if and (eq ($group.device | default "cpu") "cuda") (not $gpus) -}}
{{- fail (printf "%s.device is cuda, but %s.resources.limits has no nvidia.com/gpu: ask for a GPU, or set the device to cpu" $at $at) -}}
{{- end -}}
{{- with $group.autoscaling -}}
{{- if .enabled -}}
{{- if not $.Values.ray.autoscaler.enabled -}}
{{- fail (printf "%s.autoscaling.enabled asks for workers that no pod is made for: set ray.autoscaler.enabled too" $at) -}}
{{- end -}}
{{- if eq ($group.device | default "cpu") "cuda" -}}
{{- fail (printf "%s.autoscaling.enabled needs workers that load and drop experts while they serve, and those on GPUs do not: leave it out" $at) -}}
{{- end -}}
{{- if or (gt (int (.minWorkers | default 1)) (int $group.workers)) (lt (int .maxWorkers) (int $group.workers)) -}}
{{- fail (printf "%s.workers is %d, outside of %s.autoscaling %d to %d: put it between the two" $at (int $group.workers) $at (int (.minWorkers | default 1)) (int .maxWorkers)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq ($group.device | default "cpu") "cpu") $gpus -}}
{{- fail (printf "%s.resources.limits has nvidia.com/gpu, but %s.device is cpu: set the device to cuda, or leave the GPU out" $at $at) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq (int $workers) 0 -}}
{{- fail "experts.groups has no workers: give at least one group with workers of 1 or more" -}}
{{- end -}}
{{- if gt (int ($experts.replicas_per_expert | default 1)) (int $workers) -}}
{{- fail (printf "config.experts.replicas_per_expert is %d, but experts.groups has %d worker(s) in all: add workers" (int $experts.replicas_per_expert) (int $workers)) -}}
{{- end -}}
{{- if eq ($attention.device | default "cpu") "cuda" -}}
{{- $gpus := int (get .Values.attention.resources.limits "nvidia.com/gpu" | default 0) -}}
{{- $ranks := int ($attention.tensor_parallel_size | default 1) -}}
{{- if ne $gpus $ranks -}}
{{- fail (printf "config.attention.tensor_parallel_size is %d, but attention.resources.limits has %d nvidia.com/gpu: give each replica one GPU per rank" $ranks $gpus) -}}
{{- end -}}
{{- end -}}
{{- with .Values.attention.autoscaling -}}
{{- if and .enabled (or (gt (int .minReplicas) (int $.Values.attention.replicas)) (lt (int .maxReplicas) (int $.Values.attention.replicas))) -}}
{{- fail (printf "attention.replicas is %d, outside of attention.autoscaling %d to %d: put it between the two" (int $.Values.attention.replicas) (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if and .enabled (not $.Values.ray.autoscaler.enabled) -}}
{{- fail "attention.autoscaling.enabled asks for replicas that no pod is made for: set ray.autoscaler.enabled too" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.ray.gcsFaultTolerance.enabled (not .Values.ray.gcsFaultTolerance.redisAddress) -}}
{{- fail "ray.gcsFaultTolerance.enabled needs ray.gcsFaultTolerance.redisAddress, such as redis:6379" -}}
{{- end -}}
{{- end -}}
