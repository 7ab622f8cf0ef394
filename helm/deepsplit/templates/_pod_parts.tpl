{{/* Longest stream, then Ray's own end, then some air. */}}
{{- define "deepsplit.graceSeconds" -}}
{{- add .Values.longestStreamSeconds 60 -}}
{{- end -}}

{{- define "deepsplit.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAsUser }}
runAsGroup: {{ .Values.runAsGroup }}
fsGroup: {{ .Values.runAsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "deepsplit.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* KubeRay's own readiness probe would ask each worker for Serve's proxy, which is off. Every node answers for its
     raylet (and the head for the GCS); only gateways answer for clients, and only they are ready when a request would
     find a replica. KubeRay adds no probe where there is one. */}}
{{- define "deepsplit.probes" -}}
startupProbe:
  {{- include "deepsplit.nodeProbe" . | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  {{- include "deepsplit.nodeProbe" . | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- if eq .role "gateway" }}
  httpGet:
    path: /ready
    port: serve
    scheme: {{ ternary "HTTP" "HTTPS" (eq .root.Values.tls.gateway.mode "disabled") }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
  {{- else }}
  {{- include "deepsplit.nodeProbe" . | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
  {{- end }}
{{- end -}}

{{- define "deepsplit.nodeProbe" -}}
httpGet:
  path: /api/healthz
  port: 52365
{{- end -}}

{{- define "deepsplit.modelVolume" -}}
{{- $model := .root.Values.model -}}
{{- if eq $model.source "pvc" -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ $model.pvc.claimName }}
    readOnly: true
{{- else if eq $model.source "hostPath" -}}
- name: model
  hostPath:
    path: {{ $model.hostPath.path }}
    type: Directory
{{- else if eq $model.source "csi" -}}
- name: model
  csi:
    driver: {{ $model.csi.driver }}
    readOnly: true
    {{- with $model.csi.volumeAttributes }}
    volumeAttributes:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $model.csi.secretName }}
    nodePublishSecretRef:
      name: {{ . }}
    {{- end }}
{{- else if eq $model.source "objectStore" -}}
- name: model
  emptyDir:
    sizeLimit: {{ $model.objectStore.size }}
{{- end -}}
{{- end -}}

{{- define "deepsplit.rayStartParams" -}}
disable-usage-stats: "true"
# Bytes: only Serve's own calls pass through the object store.
object-store-memory: "134217728"
metrics-export-port: "8080"
dashboard-agent-listen-port: "52365"
{{- end -}}
