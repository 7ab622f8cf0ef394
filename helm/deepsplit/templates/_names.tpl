{{/* Names, labels and images. */}}

{{/* KubeRay adds up to 22 characters to a RayService's name and allows 63 in all. */}}
{{- define "deepsplit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "deepsplit.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: deepsplit
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What the pods of one role of this release have in common, for ever: selectors cannot be changed.
     Not app.kubernetes.io/name: KubeRay gives its pods one, and its head service selects by that.
     Call with (dict "root" $ "role" "gateway"); an empty role means every pod. */}}
{{- define "deepsplit.selector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: deepsplit
{{- with .role }}
deepsplit.io/role: {{ . }}
{{- end }}
{{- end -}}

{{/* Call with (dict "root" $ "kind" "cpu"). */}}
{{- define "deepsplit.image" -}}
{{- $image := get .root.Values.images .kind -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- $tag := $image.tag | default (printf "%s-%s" .root.Chart.AppVersion .kind) -}}
{{- if eq $tag "latest" -}}
{{- fail (printf "images.%s.tag is latest, which is another image tomorrow: name a version, or set images.%s.digest" .kind .kind) -}}
{{- end -}}
{{- printf "%s:%s" $image.repository $tag -}}
{{- end -}}
{{- end -}}

{{/* cpu or gpu: which image the pods of a group run. Call with (dict "root" $ "role" "experts" "group" $group). */}}
{{- define "deepsplit.imageKind" -}}
{{- $device := dig "attention" "device" "cpu" .root.Values.config -}}
{{- if eq .role "experts" -}}{{- $device = .group.device | default "cpu" -}}{{- end -}}
{{- ternary "gpu" "cpu" (and (has .role (list "attention" "experts")) (eq $device "cuda")) -}}
{{- end -}}

{{/* Whether an object of a kind that an operator brings is rendered. Call with (dict "root" $ "want" "auto" "api" "group/version/Kind"). */}}
{{- define "deepsplit.wanted" -}}
{{- if or (eq (toString .want) "true") (and (eq (toString .want) "auto") (.root.Capabilities.APIVersions.Has .api)) -}}true{{- end -}}
{{- end -}}
