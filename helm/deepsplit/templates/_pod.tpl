{{/* The pod of a Ray node. Call with (dict "root" $ "role" "gateway" "group" .Values.gateway). */}}
{{- define "deepsplit.pod" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $group := .group -}}
{{- $values := $root.Values -}}
{{- $kind := include "deepsplit.imageKind" . -}}
metadata:
  labels:
    {{- include "deepsplit.selector" . | nindent 4 }}
    {{- with $values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $group.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # A changed configuration is a changed pod: KubeRay then builds a new cluster beside the old one.
    deepsplit.io/config: {{ include "deepsplit.config" $root | sha256sum | trunc 16 | quote }}
    {{- with $group.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- if eq $role "head" }}
  {{- if not $values.ray.autoscaler.enabled }}
  serviceAccountName: {{ include "deepsplit.fullname" $root }}
  {{- end }}
  # Only the autoscaler beside the head talks to Kubernetes.
  automountServiceAccountToken: {{ $values.ray.autoscaler.enabled }}
  {{- else }}
  serviceAccountName: {{ include "deepsplit.fullname" $root }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "deepsplit.graceSeconds" $root }}
  securityContext:
    {{- include "deepsplit.podSecurity" $root | nindent 4 }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and (ne $role "head") $values.topologySpread.enabled }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ $values.topologySpread.topologyKey }}
      whenUnsatisfiable: {{ $values.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "deepsplit.selector" . | nindent 10 }}
  {{- end }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq $values.model.source "objectStore" }}
  initContainers:
    - name: fetch-model
      image: {{ $values.model.objectStore.image }}
      imagePullPolicy: {{ $values.imagePullPolicy }}
      {{- if and (has $role (list "head" "gateway")) $values.model.objectStore.metadataCommand }}
      command:
        {{- toYaml $values.model.objectStore.metadataCommand | nindent 8 }}
      {{- else }}
      command:
        {{- toYaml $values.model.objectStore.command | nindent 8 }}
      {{- end }}
      env:
        - name: DEEPSPLIT_ROLE
          value: {{ $role }}
        - name: HOME
          value: /tmp
        {{- with $values.model.objectStore.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $values.model.objectStore.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- toYaml $values.model.objectStore.resources | nindent 8 }}
      securityContext:
        {{- include "deepsplit.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - name: model
          mountPath: {{ $values.model.mountPath }}
        - name: tmp
          mountPath: /tmp
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" (eq $role "head") }}
      image: {{ include "deepsplit.image" (dict "root" $root "kind" $kind) }}
      imagePullPolicy: {{ $values.imagePullPolicy }}
      env:
        # The root file system is read-only: caches and whatever else wants a home go to the pod's own scratch volume.
        - name: HOME
          value: /tmp
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
        - name: RAY_ENABLE_UV_RUN_RUNTIME_ENV
          value: "0"
        # Ray's default of 15 starves the model whenever anything else runs on the host.
        - name: RAY_worker_niceness
          value: "0"
        {{- with $group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- if eq $role "head" }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        {{- end }}
        {{- if has $role (list "head" "gateway") }}
        # On the head only because KubeRay looks here for the port of its own serve service.
        - name: serve
          containerPort: 8000
        - name: serve-grpc
          containerPort: 9000
        {{- end }}
        - name: metrics
          containerPort: 8080
      resources:
        {{- toYaml $group.resources | nindent 8 }}
      securityContext:
        {{- include "deepsplit.containerSecurity" $root | nindent 8 }}
      {{- include "deepsplit.probes" . | nindent 6 }}
      lifecycle:
        preStop:
          exec:
            command:
              - python
              - -m
              - deployments.directory.node_drain
              - --wait-s
              - {{ $values.longestStreamSeconds | quote }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: shm
          mountPath: /dev/shm
        {{- if ne $values.model.source "image" }}
        - name: model
          mountPath: {{ $values.model.mountPath }}
          readOnly: true
          {{- with $values.model.subPath }}
          subPath: {{ . }}
          {{- end }}
        {{- end }}
        {{- if ne $values.tls.internal.mode "disabled" }}
        - name: internal-tls
          mountPath: /etc/deepsplit/internal-tls
          readOnly: true
        {{- end }}
        {{- if eq $role "gateway" }}
        {{- if not $values.auth.anonymous }}
        - name: keys
          mountPath: /etc/deepsplit/keys
          readOnly: true
        {{- end }}
        {{- if ne $values.tls.gateway.mode "disabled" }}
        - name: tls
          mountPath: /etc/deepsplit/tls
          readOnly: true
        {{- end }}
        {{- end }}
        {{- with $group.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: {{ $group.scratchSize | default "10Gi" }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $group.shmSize | default "512Mi" }}
    {{- include "deepsplit.modelVolume" . | nindent 4 }}
    {{- if ne $values.tls.internal.mode "disabled" }}
    - name: internal-tls
      secret:
        secretName: {{ include "deepsplit.internalTlsSecret" $root }}
        defaultMode: 0440
    {{- end }}
    {{- if eq $role "gateway" }}
    {{- if not $values.auth.anonymous }}
    - name: keys
      secret:
        secretName: {{ include "deepsplit.keysSecret" $root }}
        defaultMode: 0440
        items:
          - key: keys.yaml
            path: keys.yaml
    {{- end }}
    {{- if ne $values.tls.gateway.mode "disabled" }}
    - name: tls
      secret:
        secretName: {{ include "deepsplit.gatewayTlsSecret" $root }}
        defaultMode: 0440
        items:
          - key: tls.crt
            path: tls.crt
          - key: tls.key
            path: tls.key
    {{- end }}
    {{- end }}
    {{- with $group.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
