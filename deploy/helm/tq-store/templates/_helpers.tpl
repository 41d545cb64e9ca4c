{{- define "tq-store.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}{{ end -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "tq-store.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tq-store.labels" -}}
{{ include "tq-store.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "tq-store.tokenSecret" -}}
{{- if .Values.tokens.secret }}{{ .Values.tokens.secret }}
{{- else if .Values.tokens.inline }}{{ include "tq-store.name" . }}-tokens
{{- else }}{{ fail "name a Secret with tokens: --set tokens.secret=NAME (deploy/README.md makes one)" }}
{{- end }}
{{- end }}
